"""A training step on the meta device, with every byte counted.

The very model and the very optimizer are built on `meta` and run two updates and an evaluation;
`LiveBytes` sees every storage appear and die. The same tracker counts a real step on the CPU, and
both give the same number to the byte.

See docs/memory.md.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lowmem.config.schema import ModelConfig, OptimizerConfig, UpdateMode, WeightFormat
from lowmem.kernels.blockwise import lookup_tables
from lowmem.kernels.grouped_weight import Weight
from lowmem.kernels.random_normal import lookup_table
from lowmem.kernels.slices import rehearsing
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.phases import current_phase
from lowmem.planner.plan import Choice

GRANULE = 512  # the CUDA caching allocator rounds every request up to it
_MULTIPROCESSORS = 132  # of the largest cards that are common
_STRAY_BYTES = 2**20  # more than this in real memory during a rehearsal is a bug

PARTS = (
    "weights",
    "states",
    "projections",
    "gradients",
    "activations",
    "loss",
    "update",
    "batch",
    "workspace",
)


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages, by part, each rounded up to 512, with the peak and its moment.

    scratch: add what CUDA operators allocate out of sight. events: (id, +bytes) when a storage
    appears, (id, -bytes) when it dies: for the allocator.
    """

    def __init__(self, device_type: str, scratch: bool = False) -> None:
        super().__init__()
        self.device_type = device_type
        self._workspaces: dict[Any, Callable[..., int]] = WORKSPACE if scratch else {}
        self.events: list[tuple[int, int]] = []
        self.live = 0
        self.peak = 0
        self.peak_parts: dict[str, int] = {}
        self.peak_phase: tuple[str, ...] = ()
        self._parts: defaultdict[str, int] = defaultdict(int)
        self._seen = WeakIdKeyDictionary()
        self._ids = itertools.count()

    def track(self, tensors: Mapping[str, Tensor] | list[Tensor], part: str) -> None:
        """Count tensors that exist beforehand."""
        for tensor in tensors.values() if isinstance(tensors, Mapping) else tensors:
            self._add(tensor, part)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in IN_PLACE and args[0].is_meta:
            return args[0]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, part_of(current_phase()))
        scratch = self._workspaces.get(func)
        if scratch is not None:
            self._use_briefly(scratch(*args))
        return out

    def _use_briefly(self, scratch: int) -> None:
        """Memory that an operator took and gave back before it returned."""
        self._mark(scratch, "workspace")
        number = next(self._ids)
        self.events += [(number, scratch), (number, -scratch)]

    def _add(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or storage.nbytes() == 0:
            return
        if tensor.device.type != self.device_type:
            if self.device_type == "meta" and storage.nbytes() > _STRAY_BYTES:
                raise RuntimeError(
                    f"{storage.nbytes()} bytes of real memory during a rehearsal, in "
                    f"{' / '.join(current_phase())}: a factory does not name its device"
                )
            return
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        number = next(self._ids)
        self._seen[storage] = number
        self.live += size
        self._parts[part] += size
        self.events.append((number, size))
        weakref.finalize(storage, self._drop, number, size, part)
        self._mark(0, part)

    def _drop(self, number: int, size: int, part: str) -> None:
        self.live -= size
        self._parts[part] -= size
        self.events.append((number, -size))

    def _mark(self, scratch: int, part: str) -> None:
        if self.live + scratch <= self.peak:
            return
        self.peak = self.live + scratch
        self.peak_phase = current_phase()
        self.peak_parts = {name: size for name, size in self._parts.items() if size}
        if scratch:
            self.peak_parts[part] = self.peak_parts.get(part, 0) + scratch


def part_of(phases: tuple[str, ...]) -> str:
    """What a storage that appears during these phases is for: one of PARTS."""
    for name in reversed(phases):
        if name in ("update", "refresh"):
            return "update"
        if name == "hold" or name.startswith("gradient"):
            return "gradients"
        if name in ("loss", "batch"):
            return name
    return "activations"


def _eigh_scratch(matrix: Tensor, *rest: Any) -> int:
    # Bound for cuSOLVER's syevd in float64: a copy of the matrix and twice its size to work in.
    return 3 * matrix.numel() * matrix.element_size()


def _flash_backward_scratch(grad: Tensor, query: Tensor, key: Tensor, *rest: Any) -> int:
    # flash-attention 2: row sums, and a float32 query gradient padded to 128 tokens and 32 columns,
    # in deterministic mode (which exact resume needs) one for each share of the processors.
    batch, heads, length, width = query.shape
    tokens, columns = -(-length // 128) * 128, -(-width // 32) * 32
    shares = -(-_MULTIPROCESSORS // (batch * heads))
    # With fewer key heads, their gradients are first made for every query head.
    expanded = 2 * query.numel() * query.element_size() if key.shape[1] != heads else 0
    return 4 * batch * heads * tokens * (columns * shares + 1) + expanded


IN_PLACE = {
    getattr(torch.ops.aten, name)
    for name in [
        "mul_",
        "add_",
        "sub_",
        "div_",
        "addcmul_",
        "addcdiv_",
        "clamp_",
        "sqrt_",
        "neg_",
        "exp_",
        "copy_",
        "zero_",
        "fill_",
        "addmm_",
        "bitwise_and_",
        "bitwise_xor_",
        "nan_to_num_",
    ]
}
"""Operators that only overwrite their first argument: on meta there is nothing to do."""

WORKSPACE: dict[Any, Callable[..., int]] = {
    torch.ops.aten._linalg_eigh.default: _eigh_scratch,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_scratch,
}
"""Scratch memory of operators that allocate it out of sight, in bytes, from their arguments.

The tracker adds it at the moment of the call; see docs/memory.md.
"""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed update needs; the fields are those of LiveBytes."""

    tensors: int
    parts: dict[str, int]
    instant: str
    events: list[tuple[int, int]]


def rehearse(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    choice: Choice,
    seq_len: int,
    *,
    attention: str,
    workspace: int = 0,
    updates: int = 1,
) -> Rehearsal:
    """Run updates and an evaluation batch on meta and return their peak.

    attention: the operator that the planned device will use. workspace: bytes that libraries hold
    throughout. updates: every state exists before the first, so a second changes nothing but the
    classic allocator's holes.
    """
    tracker = LiveBytes("meta", scratch=attention != "cpu")
    llama = model_on_meta(
        model, choice.weights, choice.recompute, attention, keep_logits=choice.logits == "keep"
    )
    owner = optimizer_on_meta(llama, optimizer, choice.update)
    owner.attach(llama)
    track_persistent(tracker, owner)
    libraries = torch.empty(workspace, dtype=torch.uint8, device="meta")
    tracker.track([libraries], "workspace")
    with tracker, standing_for(attention):
        for _ in range(updates):
            loss_and_norm = update(llama, owner, choice, seq_len)
            owner.step()
            del loss_and_norm  # training reads them after the step
        evaluate(llama, choice, seq_len)
    del libraries
    return Rehearsal(
        tracker.peak, _ordered(tracker.peak_parts), sentence(tracker.peak_phase), tracker.events
    )


def model_on_meta(
    model: ModelConfig,
    weights: WeightFormat,
    recompute: str,
    attention: str,
    *,
    keep_logits: bool = False,
) -> Llama:
    """The very model that would be trained, without memory."""
    return Llama(
        model,
        dtype=compute_dtype(weights, "cpu" if attention == "cpu" else "cuda"),
        device="meta",
        int8=weights == "int8",
        recompute=recompute,
        keep_logits=keep_logits,
        attention=attention,
    )


def optimizer_on_meta(llama: Llama, optimizer: OptimizerConfig, mode: UpdateMode) -> Optimizer:
    """Its optimizer, when that holds most."""
    owner = build_optimizer(
        optimizer,
        llama.weights(),
        llama.roles(),
        mode=mode,
        seed=0,
        head_dim=llama.config.head_dim,
    )
    hold_worst_window(owner)
    return owner


def standing_for(attention: str) -> AbstractContextManager[None]:
    """Tensors on meta are cut as on the device that has this attention."""
    return rehearsing("cpu" if attention == "cpu" else "cuda")


def track_persistent(
    tracker: LiveBytes, optimizer: Optimizer, names: Iterable[str] | None = None
) -> None:
    """Count weights and states, which live as long as the run, with the tables they look up.

    names: of the weights; all that the optimizer has by default.
    """
    for name in optimizer.slots if names is None else names:
        slot = optimizer.slots[name]
        tracker.track(stored(slot.weight), "weights")
        for key, value in slot.state.items():
            if isinstance(value, Tensor):
                tracker.track([value], "projections" if key.endswith("basis") else "states")
            if key.endswith(".codes"):
                tracker.track(lookup_tables(str(slot.weight.device)), "states")
            if key.endswith("basis"):
                tracker.track([lookup_table(str(slot.weight.device))], "projections")


def stored(weight: Weight) -> list[Tensor]:
    """The tensors that hold a weight."""
    return [weight] if isinstance(weight, Tensor) else [weight.codes, weight.scales, weight.zeros]


def update(
    model: Llama, optimizer: Optimizer, choice: Choice, seq_len: int
) -> tuple[Tensor, Tensor]:
    """The gradients of one update, and its loss and norm; `optimizer.step()` is next."""
    count = min(choice.accumulate, 2)  # a third micro-batch adds nothing new
    return gather(
        model,
        optimizer,
        MadeAnew(lambda: (_batch(choice.micro_batch, seq_len) for _ in range(count))),
        count=count,
        tokens=1,
        lr=0.0,
        clip=choice.clip,
    )


def evaluate(model: Llama, choice: Choice, seq_len: int) -> None:
    """An evaluation batch of the size of a micro-batch."""
    inputs, targets = _batch(choice.micro_batch, seq_len)
    model.loss_sum(inputs, targets)


def _batch(rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    shape = (rows, seq_len)
    return (
        torch.empty(shape, dtype=torch.int64, device="meta"),
        torch.empty(shape, dtype=torch.int64, device="meta"),
    )


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: parts[name] for name in PARTS if parts.get(name)}


def sentence(phases: tuple[str, ...]) -> str:
    """The moment as people say it: "backward of block 32, gradient of mlp.down"."""
    return ", ".join(dict.fromkeys(phases)) or "before the first update"
