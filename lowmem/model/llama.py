"""LLaMA with Hugging Face's parameter names and an explicit backward.

    model = Llama(config, dtype=torch.bfloat16, device="cuda")
    model.initialise(seed=0)
    model.sink = optimizer                         # takes gradients as soon as they are there
    model.loss(inputs, targets, total_tokens).backward()

Weights are no inputs of autograd: every gradient is made by hand in a fixed order, handed to the
`GradientSink` exactly once per backward (those of embedding and head in row slices), and held by
nobody else. The sink that is there from the beginning fills `parameter.grad` like any module.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lowmem.config.recompute import levels_of
from lowmem.config.schema import BoundaryPlace, Matmul, ModelConfig, StatePlace, WeightFormat
from lowmem.kernels import rope
from lowmem.kernels.attention import Backend, choose_backend
from lowmem.kernels.grouped_weight import GroupedWeight, Weight, float_rows
from lowmem.kernels.linear_cross_entropy import cross_entropy
from lowmem.kernels.rms_norm import rms_norm
from lowmem.kernels.slices import row_slices
from lowmem.kernels.vector_math import settle_vector_math
from lowmem.model.block import Block, BlockStep, Linear, Norm, Rotation
from lowmem.model.boundaries import Boundaries, HostInputs
from lowmem.model.ends import EmbeddingStep, LossStep, embedded
from lowmem.model.int8 import GROUP, Int8Linear
from lowmem.model.layer_major import MicroBatches, layer_major_loss
from lowmem.model.residence import Residence
from lowmem.model.scaled import layer_type
from lowmem.model.sink import GradientSink, ParameterGrads
from lowmem.naming import seed_of
from lowmem.phases import phase
from lowmem.transfers import Transfers

_DRAWN_ELEMENTS = 2**18  # random numbers that exist at a time; less than a step takes
_ROLES = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "embed_tokens": "embedding",
    "lm_head": "head",
}


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face keeps under `model.`."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        int8: bool,
        int8_ends: bool,
        dtype: torch.dtype,
        device: torch.device,
        home: torch.device,
        compiled: bool,
        matmul: Matmul,
    ) -> None:
        """home: of the blocks."""
        super().__init__()
        h, where = config.hidden_size, {"dtype": dtype, "device": device}
        end = Int8Linear if int8_ends else Linear
        linear = layer_type(int8=int8, matmul=matmul)
        self.embed_tokens = end(h, config.vocab_size, bias=False, dtype=dtype, device=device)
        indices = range(config.num_hidden_layers)
        there = {"dtype": dtype, "device": home}
        self.layers = nn.ModuleList(
            Block(config, i, backend, linear, compiled, **there) for i in indices
        )
        self.norm = Norm(h, **where)


def compute_dtype(weights: WeightFormat, device: str) -> torch.dtype:
    """Of activations, gradients and all weights that are no codes. device: "cpu" or "cuda"."""
    exact = weights == "fp32" or (weights == "int8" and device == "cpu")
    return torch.float32 if exact else torch.bfloat16


class Llama(nn.Module):
    """The decoder with its head.

    Weights are allocated uninitialised on `device`, which may be "meta". int8: the matrices of the
    blocks are 8-bit codes, and dtype is that of the rest; int8_ends: so are embedding and head.
    recompute: what blocks keep for backward. keep_logits: keep them, too, instead of making them
    twice. attention: "auto" takes the device's own; on meta it names the rehearsed one. boundaries:
    where the inputs of blocks wait for their backward. blocks: where their weights live; from the
    host they come for their use, in layer-major order and evaluation. compiled: the element-wise
    pieces of blocks are. matmul: how the products of their linear layers are made.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        int8: bool = False,
        int8_ends: bool = False,
        recompute: str = "keep",
        keep_logits: bool = False,
        attention: str = "auto",
        boundaries: BoundaryPlace = "keep",
        blocks: StatePlace = "device",
        compiled: bool = False,
        matmul: Matmul = "exact",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        if device.type == "cpu":
            settle_vector_math()
        self.config, self.int8, self.int8_ends = config, int8, int8_ends
        self.recompute, self.keep_logits = recompute, keep_logits
        self.backend = choose_backend(attention, device, dtype, config.head_dim)
        home = torch.device("cpu") if blocks == "host" and device.type == "cuda" else device
        self.model = Decoder(
            config, self.backend, int8, int8_ends, dtype, device, home, compiled, matmul
        )
        self.residence: Residence | None = None
        if blocks == "host":
            self.residence = Residence(self.blocks, Transfers(device))
        if not config.tie_word_embeddings:
            h, vocabulary = config.hidden_size, config.vocab_size
            end = Int8Linear if int8_ends else Linear
            self.lm_head = end(h, vocabulary, bias=False, dtype=dtype, device=device)
        self.sink: GradientSink = ParameterGrads(self)
        self.boundaries = Boundaries(boundaries)
        self.inputs = HostInputs(config.num_hidden_layers - 1, Transfers(device))
        self._longest_rotation: Rotation | None = None

    @property
    def blocks(self) -> list[Block]:
        """From the first to the last."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    @property
    def head_weight(self) -> Weight:
        """(V, h): the head's own, or the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        """Sum of the tokens' cross-entropies / total_tokens, a float32 scalar to call backward on.

        inputs, targets: (b, t) int64; a target of -100 is skipped. total_tokens: targets of the
        whole update, so that micro-batches add up.
        """
        return self._loss(inputs, targets, total_tokens, None)

    def here(self, index: int, then: int, *, changes: bool = False) -> AbstractContextManager[None]:
        """Inside, a block's weights are on the device; those of block `then`, if any, come next."""
        if self.residence is None:
            return nullcontext()
        return self.residence.here(index, then, changes=changes)

    def away(self) -> set[str]:
        """Names of the weights that live in host memory."""
        if self.residence is None:
            return set()
        return {name for name in self.weights() if name.startswith("model.layers.")}

    def layer_major_loss(
        self, micro_batches: MicroBatches, total_tokens: int, count: int
    ) -> Tensor:
        """The loss of a whole update, whose gradients are made and handed over block by block."""
        return layer_major_loss(self, micro_batches, total_tokens, count)

    def drawn_loss(self, inputs: Tensor, targets: Tensor, total_tokens: int, seed: int) -> Tensor:
        """The same for targets drawn from the model's own predictions, where there are targets."""
        return self._loss(inputs, targets, total_tokens, seed)

    def _loss(self, inputs: Tensor, targets: Tensor, total_tokens: int, seed: int | None) -> Tensor:
        if self.residence is not None:
            raise ValueError("blocks in host memory are trained in layer-major order")
        rotation = self.rotation(inputs.shape[1])
        tied: list[Tensor] = []  # the head's gradient waits for the embedding's
        with phase("embedding"):
            x = EmbeddingStep.apply(self._anchor(), inputs, self, tied)
        levels = levels_of(self.recompute, len(self.model.layers))
        away = (self.inputs, self.inputs.begin()) if self.boundaries.where == "host" else None
        for index, (block, level) in enumerate(zip(self.model.layers, levels, strict=True)):
            with phase(f"forward of block {index + 1}"):
                x = BlockStep.apply(x, block, rotation, level, self.hand, away)
        with phase("loss"):
            return LossStep.apply(x, targets.reshape(-1), 1 / total_tokens, self, tied, seed)

    @torch.no_grad()
    def loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the tokens' cross-entropies, a float32 scalar; keeps nothing for a backward."""
        y = self._final(inputs)
        with phase("loss"):
            return cross_entropy(y, self.head_weight, targets.reshape(-1), 1.0)[0]

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """(b, t, V) float32, whole: for tests and small uses."""
        head = float_rows(self.head_weight, 0, self.config.vocab_size)
        return (self._final(inputs) @ head.t()).float().view(*inputs.shape, -1)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Matrices ~ N(0, initializer_range), norms 1, biases 0; on meta there is nothing to fill.

        Each matrix has a generator of its own and is drawn in float32 on the CPU, so every device
        and format gets the same numbers up to rounding, codes rounded to nearest.
        """
        for name, weight in self.weights().items():
            role = _role(name)
            if weight.device.type == "meta":
                continue
            if role in ("norm", "bias"):
                assert isinstance(weight, Tensor)
                weight.fill_(1 if role == "norm" else 0)
            else:
                self._draw(weight, seed_of(seed, f"init/{name}"))

    def weights(self) -> dict[str, Weight]:
        """Parameter name -> what an optimizer updates: the parameter, or codes in its place."""
        found: dict[str, Weight] = {}
        for prefix, module in self.named_modules():
            if isinstance(module, Int8Linear):
                found[f"{prefix}.weight"] = module.weight
            found |= {f"{prefix}.{k}": v for k, v in module.named_parameters(recurse=False)}
        return found

    def roles(self) -> dict[str, str]:
        """Parameter name -> what it is: attention.q, mlp.down, embedding, head, norm, bias ..."""
        return {name: _role(name) for name in self.weights()}

    def _draw(self, matrix: Weight, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape_of = matrix if isinstance(matrix, Tensor) else matrix.codes
        for start, stop in row_slices(shape_of, GROUP, _DRAWN_ELEMENTS):
            numbers = torch.empty(stop - start, matrix.shape[1], dtype=torch.float32, device="cpu")
            numbers.normal_(0, self.config.initializer_range, generator=generator)
            if isinstance(matrix, GroupedWeight):
                matrix.rows(start, stop).store(numbers.to(matrix.device))
            else:
                matrix[start:stop].copy_(numbers)
            del numbers  # before the next are made

    def hand(self, name: str, gradient: Tensor) -> None:
        """To the sink that is set when the gradient is ready, not when the forward ran."""
        self.sink.receive(name, gradient)

    def hand_rows(self, name: str, start: int, rows: Tensor) -> None:
        """The same for the rows start, start + 1, ... of a gradient."""
        self.sink.receive_rows(name, start, rows)

    def _anchor(self) -> Tensor:
        """An empty tensor that requires a gradient, so that the embedding's output does too."""
        return torch.empty(0, device=self.head_weight.device, requires_grad=True)

    def _final(self, inputs: Tensor) -> Tensor:
        """Normalised output of the last block, (b * t, h); keeps nothing."""
        rotation = self.rotation(inputs.shape[1])
        with phase("embedding"):
            x = embedded(inputs.reshape(-1), self.model.embed_tokens.weight)
        for index, block in enumerate(self.model.layers):
            with phase(f"forward of block {index + 1}"), self.here(index, then=index + 1):
                x = block(x, rotation, "full")[0]
        return rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)[0]

    def rotation(self, length: int) -> Rotation:
        """Rotary tables of a sequence length: the beginning of those of the longest so far."""
        longest = self._longest_rotation
        if longest is None or len(longest[0]) < length:
            self._longest_rotation = longest = None  # before the longer one is made
            frequency = _frequencies(self.config, self.head_weight.device)
            self._longest_rotation = longest = rope.tables(frequency, length)
        cos, sin = longest
        return cos[:length], sin[:length]


def _role(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if kind == "bias":
        return "bias"
    return _ROLES.get(module.rsplit(".", 1)[-1], "norm")


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    plain = rope.frequencies(config.head_dim, config.rope_theta, device)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    return rope.llama3_frequencies(
        plain,
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
