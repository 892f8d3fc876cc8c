"""How long an update will take: its operations, the bytes it moves, and the rates of the card.

    estimate(Timed(model, optimizer, choice, rows=512, seq_len=256), card)   # tokens/s, seconds

An update is a list of `Op`s. The time of each is the longer of operations / (utilisation x peak)
and bytes / (0.8 x bandwidth), and times add up. What is not counted: gaps between kernels (small
models on fast cards are slower than said), an optimizer's float32 copies of slices, as if they
stayed in the cache, evaluation, saving, reading text. Needs no torch.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowmem.config.defaults import with_updates
from lowmem.config.recompute import Level, keeps_attention, keeps_mlp, levels_of
from lowmem.config.schema import Config, ModelConfig, OptimizerConfig
from lowmem.errors import ConfigError
from lowmem.planner.plan import Card, Choice, Rates, Speed
from lowmem.units import format_count, format_span

UTILISATION = {"products": 0.5, "attention": 0.4}
"""Share of the peak rate. Presets: training end to end is published with 33 to 60 % on A100 and
H100, 56 % by TinyLlama (arXiv:2401.02385); attention of short rows is slower."""
HALF_FULL = 64  # tokens of a micro-batch at which its products reach half of that: a preset
REACHED = {"products": 1.0, "attention": 0.8}
"""The same of products that were timed on the card; attention is slower in the ratio above."""
BANDWIDTH = 0.8  # share that a pass over large tensors reaches: a preset
ERROR = 0.25  # of an estimate from presets
# Operations/s of SVD, QR and Cholesky, which do not follow the peak of products: the matrices of 7B
# by SVD every 200 updates are 2.87 s per update on an A100 (arXiv:2412.05270, Table 7).
SOLVER_RATE = 0.82e12

PASSES = {
    "norm": 5,
    "norm again": 4,
    "norm backward": 3,
    "residual": 3,
    "rotation": 11,
    "gate": 5,
    "gate backward": 5,
    "logits": 29,
    "codes": 5.5,
    "bf16 sums": 12,
    "int8 sums": 115,
}
"""What kernels/ move per element, in elements of two bytes, as they are written now. Two work on
slices that stay in the cache, "norm backward" and "gate backward": each operand counts once."""

_ACTIVATION = 2  # bytes: bf16, as gradients and most weights are
_CODE = 1  # of a weight in int8, whose scales are few
_SUM = 4  # float32
_HELD = {"fp32": _SUM, "bf16": 2.0, "int8": 1 + 4 / 256, "host": _SUM}  # bytes of a sum
_STAGED = 26  # bytes of device memory per element that visits it to be added to
_BUS = 20e9  # bytes/s between page-locked host memory and a card: a preset, PCIe 4.0 x16 has 31.5e9
_STATE = {"fp32": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 256}
_NEWTON_SCHULZ = 5  # iterations

Kind = Literal["products", "attention", "traffic", "solver", "bus"]


@dataclass(frozen=True)
class Timed:
    """What is estimated: a choice with the settings of its method; rows: sequences per update."""

    model: ModelConfig
    optimizer: OptimizerConfig
    choice: Choice
    rows: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Per update."""
        return self.rows * self.seq_len


@dataclass(frozen=True)
class Op:
    """Operations and bytes of one thing that a card does, `times` in an update."""

    part: str  # for people
    kind: Kind
    operations: float = 0.0
    bytes: float = 0.0
    times: float = 1.0
    tokens: float = 0.0  # of a product with activations, which few of them leave half idle

    def seconds(self, rates: Rates) -> float:
        if self.kind == "bus":
            return self.times * self.bytes / _BUS
        moving = self.bytes / ((1.0 if rates.measured else BANDWIDTH) * 1e9 * rates.bandwidth)
        share = (REACHED if rates.measured else UTILISATION).get(self.kind)
        rate = SOLVER_RATE if share is None else share * 1e12 * rates.tflops
        filled = self.tokens / (self.tokens + HALF_FULL) if self.tokens else 1.0
        return self.times * max(self.operations / (rate * filled), moving)


Traffic = tuple[float, float]


@dataclass(frozen=True)
class Work:
    """What a method does with a matrix (m, n) in a subspace of r dimensions, per update.

    moments: tensors of state, in the matrix's shape or the subspace's (low). reads: of the
    gradient, products included; one fewer where a drawn line's projection makes the norms too
    (joined). products: in units of m n r. summed: of these, made per micro-batch where gradients
    are summed in the subspace. newton_schulz: it orthogonalises. rotations: products in units of
    m n d, of each side d that has a basis. searches: a refresh looks at the gradient. passes: more
    gradients, every `gap`.
    """

    moments: int = 2
    low: bool = False
    reads: int = 1
    joined: bool = False
    products: int = 0
    summed: int = 0
    newton_schulz: bool = False
    rotations: int = 0
    searches: bool = False
    passes: int = 0
    gap: int = 200


_PROJECTED = Work(low=True, products=4, summed=2, searches=True)
_SCALED = Work(low=True, reads=3, joined=True, products=2)  # projection, norms, step
WORK = {
    "galore": _PROJECTED,
    "natural_galore": _PROJECTED,
    "q_galore": _PROJECTED,
    "fira": Work(low=True, reads=3, products=4, searches=True),
    "apollo": _SCALED,
    "apollo_mini": _SCALED,
    "q_apollo": _SCALED,
    "q_apollo_mini": _SCALED,
    "frugal": Work(low=True),
    "cosmos": Work(moments=1, products=12, newton_schulz=True),
    "muon": Work(moments=1, reads=2, newton_schulz=True),
    "soap": Work(rotations=6),
    "lion": Work(moments=1),
    "sgd_sai": Work(moments=1, reads=4),
    "adam_mini": Work(moments=1, reads=2),
    "adamp": Work(reads=2),
    "magma": Work(reads=2),
    "stable_spam": Work(reads=3),
    "scale": Work(moments=0),
    "racs": Work(moments=0, reads=9),
    "sophia": Work(passes=1, gap=10),
}
"""Methods that differ from AdamW, by what they are composed of; the tests count their products and
how often a card reads the gradient."""


def estimate(timed: Timed, card: Card) -> Speed | None:
    """How fast these settings are on that card; None where its rates are not known."""
    if why_no_estimate(card, timed.choice.weights) or card.rates is None:
        return None
    parts = seconds(timed, card.rates)
    whole = sum(parts.values())
    return Speed(timed.tokens / whole, whole, parts, ERROR)


def seconds(timed: Timed, rates: Rates) -> dict[str, float]:
    """Of an update, by what they are for."""
    parts: defaultdict[str, float] = defaultdict(float)
    for op in operations(timed):
        parts[op.part] += op.seconds(rates)
    return dict(parts)


def why_no_estimate(card: Card, weights: str) -> str:
    """For people; empty where there is an estimate."""
    if card.kind == "cpu":
        return "nobody knows the rates of a CPU; a run measures its own"
    if card.rates is None:
        return f"no rates are known for {card.name}; name a card, e.g. --gpu rtx4090"
    fast = weights in ("bf16", "int8")
    return "" if fast else f"the table of cards has no rates for {weights} weights"


def require_rates(card: Card, weights: str) -> None:
    """ConfigError where a budget of hours cannot become updates."""
    why = why_no_estimate(card, weights)
    if why:
        raise ConfigError("train.hours needs to know how fast the card is", why, "--updates N")


def within_hours(
    config: Config, hours: float, speed: Speed, model: ModelConfig
) -> tuple[Config, str]:
    """(`config` with the updates that fit into so many hours, a note). ConfigError: none does."""
    updates = int(hours * 3600 / speed.seconds_per_update)
    if updates < 1:
        raise ConfigError(
            f"train.hours = {hours:g} is too short for one update",
            f"it takes about {format_span(speed.seconds_per_update)}",
            "more hours, a smaller --batch or a smaller --model",
        )
    tokens = updates * speed.tokens_per_second * speed.seconds_per_update
    amount = f"{format_count(tokens)} tokens, {tokens / model.parameters:.2g} per parameter"
    return with_updates(config, updates), f"updates {updates}: {hours:g} h, about {amount}"


def operations(timed: Timed) -> Iterator[Op]:
    """Everything in one update: all micro-batches, the optimizer, a refresh's share.

    Host traffic counts in full, as if nothing were computed meanwhile: an upper bound.
    """
    choice, work = timed.choice, work_of(timed.choice.method)
    passes = choice.accumulate * (1 + work.passes / gap_of(timed))
    tokens = timed.tokens / choice.accumulate
    for op in micro_batch(timed.model, choice, tokens, timed.seq_len):
        yield Op(op.part, op.kind, op.operations, op.bytes, op.times * passes)
    for m, n, count in matrices(timed.model):
        yield from _matrix_update(timed, work, m, n, count)
    heads = 1 if timed.model.tie_word_embeddings else 2
    rest = heads * timed.model.vocab_size * timed.model.hidden_size
    yield from _sums(choice, rest, projected=0)
    element = _CODE if choice.ends == "int8" else _ACTIVATION
    yield Op("optimizer", "traffic", 0, rest * _bytes_per_element(choice, Work(), weight=element))
    if choice.place == "host":
        yield Op("host memory", "bus", 0, rest * _state_bytes(choice, Work()))
    if choice.blocks == "host":
        yield Op("host memory", "bus", 0, sum(block_bytes(timed.model, choice.weights)))
    if choice.boundaries == "host" and choice.update == "layer-major":
        yield Op("host memory", "bus", 0, sum(boundary_bytes(timed.model, timed.tokens)))
    elif choice.boundaries == "host":
        moved = 2 * input_bytes(timed.model, timed.tokens) * passes / choice.accumulate
        yield Op("host memory", "bus", 0, moved)


def boundary_bytes(model: ModelConfig, tokens: float, element: int = _ACTIVATION) -> Traffic:
    """(bytes to the device, bytes to the host) of the inputs of blocks in a layer-major update.

    Forward reads the input of every block and writes the next; the loss reads one and writes its
    gradient; backward reads input and gradient and writes a gradient; the embedding reads one.
    """
    layer, blocks = element * tokens * model.hidden_size, model.num_hidden_layers
    return (3 * blocks + 2) * layer, (2 * blocks + 2) * layer


def input_bytes(model: ModelConfig, tokens: float, element: int = _ACTIVATION) -> float:
    """Bytes to the host, and as many back, of the inputs of blocks in another order: of all but the
    last."""
    return element * tokens * model.hidden_size * (model.num_hidden_layers - 1)


def block_bytes(model: ModelConfig, weights: str) -> Traffic:
    """(bytes to the device, bytes to the host) of the blocks' matrices in a layer-major update:
    for forward, for backward, and back once they have moved."""
    element = _CODE if weights == "int8" else _ACTIVATION
    blocks = element * sum(m * n * count for m, n, count in matrices(model))
    return 2 * blocks, blocks


def work_of(method: str) -> Work:
    """Methods of other packages count as AdamW."""
    return WORK.get(method, Work())


def reads_of(timed: Timed, m: int, n: int) -> int:
    """How often an update on a card reads the gradient of such a matrix."""
    work = work_of(timed.choice.method)
    drawn = timed.optimizer.options.get("projection", "random") == "random"
    return work.reads - (work.joined and drawn and rank_of(timed, m, n) == 1)


def gap_of(timed: Timed) -> int:
    return int(timed.optimizer.options.get("gap", work_of(timed.choice.method).gap))


def matrices(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(outputs, inputs, how many) of the matrices of attention and MLP."""
    h, f, kv = model.hidden_size, model.intermediate_size, model.key_value_width
    q, blocks = model.num_attention_heads * model.head_dim, model.num_hidden_layers
    return [
        (q, h, blocks),
        (kv, h, 2 * blocks),
        (h, q, blocks),
        (f, h, 2 * blocks),
        (h, f, blocks),
    ]


def micro_batch(model: ModelConfig, choice: Choice, tokens: float, seq_len: int) -> Iterator[Op]:
    """Forward and backward of one micro-batch of so many tokens."""
    h, f, kv = model.hidden_size, model.intermediate_size, model.key_value_width
    q, blocks = model.num_attention_heads * model.head_dim, model.num_hidden_layers
    levels: tuple[Level, ...] = levels_of(choice.recompute, blocks)
    if choice.update == "layer-major":  # the last block's backward does not follow its forward
        levels = tuple("full" for _ in range(blocks))
    again = sum(not keeps_mlp(level) for level in levels)
    attends = sum(not keeps_attention(level) for level in levels)
    for m, n, count in ((q, h, 1), (kv, h, 2), (h, q, 1)):
        yield _product(tokens, m, n, count * (3 * blocks + attends))
    yield _product(tokens, f, h, 2 * (3 * blocks + again))
    yield _product(tokens, h, f, 3 * blocks)

    # Forward, input gradient, and what is computed again; of few tokens too, whose kernel reads
    # codes alone: nobody has measured it, and it must not make a plan prefer small micro-batches.
    if choice.weights == "int8":
        attention = 2 * (q + kv) * h * (2 * blocks + attends)
        elements = attention + 2 * f * h * (2 * blocks + again) + h * f * 2 * blocks
        yield Op("dequantisation", "traffic", 0, _ACTIVATION * PASSES["codes"] * elements)

    causal = 2 * tokens * seq_len * q  # q k' and p v, half of each
    read = _ACTIVATION * tokens * (q + kv)
    yield Op("attention", "attention", causal, 2 * read, blocks + attends)
    yield Op("attention", "attention", 2.5 * causal, 4 * read, blocks)

    norm, rotated, gated = PASSES["norm"] * h, PASSES["rotation"] * (q + kv), PASSES["gate"] * f
    forward = 2 * norm + rotated + gated
    norms_back = 2 * (PASSES["norm again"] + PASSES["norm backward"] + PASSES["residual"]) * h
    backward = norms_back + rotated + gated + PASSES["gate backward"] * f
    width = blocks * (forward + backward) + again * norm + attends * (norm + rotated)
    yield Op("element-wise", "traffic", 0, _ACTIVATION * tokens * width)

    vocabulary = model.vocab_size
    products = 3 if choice.logits == "keep" else 4
    yield _product(tokens, vocabulary, h, products, "head and loss")
    moved = _ACTIVATION * tokens * vocabulary * PASSES["logits"]
    yield Op("head and loss", "traffic", 0, moved)
    if choice.ends == "int8":  # the head twice; of the embedding only the tokens' rows
        made = 2 * vocabulary * h + tokens * h
        yield Op("dequantisation", "traffic", 0, _ACTIVATION * PASSES["codes"] * made)
    embedding = 2 * tokens * h + vocabulary * h  # rows out and in, a gradient of zeros
    yield Op("element-wise", "traffic", 0, _ACTIVATION * embedding)


def _product(tokens: float, m: int, n: int, times: float, part: str = "products") -> Op:
    """(tokens, n) times (n, m); its two gradients are products of the same three sizes."""
    moved = _ACTIVATION * (tokens * (m + n) + m * n)
    return Op(part, "products", 2 * tokens * m * n, moved, times, tokens)


def _matrix_update(timed: Timed, work: Work, m: int, n: int, count: int) -> Iterator[Op]:
    choice, options = timed.choice, timed.optimizer.options
    rank = rank_of(timed, m, n)
    small, large, size = min(m, n), max(m, n), m * n
    inside = bool(work.summed) and choice.update == "fused+subspace" and choice.accumulate > 1
    low = large * rank if inside else 0
    yield from _sums(choice, count * (size - (size if inside else 0)), projected=count * low)
    per_update = work.products + (choice.accumulate - 1) * work.summed * inside
    longest = options.get("max_dim", 10000)  # soap's
    sides = [side for side in (m, n) if work.rotations and side <= longest]
    products = per_update * size * rank + work.rotations * size * sum(sides)
    if work.newton_schulz:
        products += _NEWTON_SCHULZ * (4 * small * size + 2 * small**3)
    if choice.method == "frugal" and options.get("projection") in ("svd", "random"):
        products += 6 * size * rank
    if products:
        yield Op("optimizer", "products", products, 0, count)
    share = large * rank / size if work.low else 1.0
    work = replace(work, reads=reads_of(timed, m, n))
    element = _CODE if choice.weights == "int8" else _ACTIVATION
    moved = size * _bytes_per_element(choice, work, share, summed_inside=inside, weight=element)
    yield Op("optimizer", "traffic", 0, moved, count)
    if choice.place == "host":
        yield Op("host memory", "bus", 0, size * _state_bytes(choice, work, share), count)
    for side in sides:  # a product and a QR with its Q
        yield Op("refresh", "solver", 5 * side**3, 0, count / options.get("frequency", 10))
    if work.searches or options.get("projection") == "svd":
        yield from _refresh(timed, m, n, rank, count / gap_of(timed))


def _refresh(timed: Timed, m: int, n: int, rank: int, times: float) -> Iterator[Op]:
    """A new basis, by what `optim/bases.py` does."""
    small, large = min(m, n), max(m, n)
    match timed.optimizer.options.get("solver", "iteration"):
        case "svd":
            solved = 6 * large * small**2 + 20 * small**3  # Golub and Van Loan, section 8.6
        case "eigh":
            solved = 2 * large * small**2 + 9 * small**3
        case _:
            yield Op("refresh", "products", 6 * m * n * rank, 0, times)
            solved = 3 * small * rank**2
    yield Op("refresh", "solver", solved, 0, times)


def rank_of(timed: Timed, m: int, n: int) -> int:
    """Dimensions of the subspace for that matrix; 0 without one."""
    rank: Any = timed.choice.rank
    if isinstance(rank, dict):
        attention = timed.model.intermediate_size not in (m, n)
        own = "attention" if attention else "mlp"
        each = [value for key, value in rank.items() if key.partition(".")[0] == own]
        rank = max(each, default=0)
    if timed.choice.method == "frugal":
        rank = float(timed.optimizer.options.get("density", 0.25))
    if rank is None:
        return 0
    return min(m, n, round(rank * min(m, n)) if isinstance(rank, float) else int(rank))


def _sums(choice: Choice, whole: float, projected: float) -> Iterator[Op]:
    """Adding each micro-batch's gradient, of `whole` elements, or its projection, to a sum.

    Host memory is written once per micro-batch, read in all but the first, and read again for the
    norm and for the step; that this overlaps with computing is left out.
    """
    if choice.accumulate == 1:
        return
    elements, moved = whole + projected, _ACTIVATION + 2.0 * _SUM
    if choice.sums in ("bf16", "int8"):
        moved = _ACTIVATION * PASSES[f"{choice.sums} sums"]
    if choice.sums == "host":
        moved = _STAGED
        crossings = 2 * choice.accumulate + 1
        yield Op("gradient sums", "bus", 0, elements * _SUM, crossings)
    yield Op("gradient sums", "traffic", 0, elements * moved, choice.accumulate)


def _bytes_per_element(
    choice: Choice,
    work: Work,
    share: float = 1.0,
    *,
    summed_inside: bool = False,
    weight: int = _ACTIVATION,
) -> float:
    """Gradient read, weight read and written, moments read and written.

    share: elements in the subspace per element of the matrix. weight: bytes of one.
    """
    gradient = _HELD[choice.sums] if choice.accumulate > 1 else _ACTIVATION
    read = gradient * (share if summed_inside else work.reads)
    return read + 2 * weight + _state_bytes(choice, work, share)


def _state_bytes(choice: Choice, work: Work, share: float = 1.0) -> float:
    """Moments read and written, per element of the matrix."""
    form = "8bit" if choice.method == "adam8bit" else choice.states
    return 2 * work.moments * share * _STATE.get(form, 4.0)
