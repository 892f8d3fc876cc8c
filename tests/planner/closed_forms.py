"""Bytes of weights, states and the peak of an update, as formulas written slowly.

The independent check of the rehearsal: nothing here is run, nothing of lowmem is imported but the
shape of a model. Notation: N tokens of a micro-batch, h hidden, f intermediate, H heads, V
vocabulary, L blocks; a matrix is m x n with sides `big` and `small`.

Where lowmem differs on purpose from the contract of reference.csv:

    scales of codes    float32, and a zero point of one byte: 5 bytes a group, not 4
    basis of FRUGAL    float32, because the sign of a remainder shows the basis' rounding
    log of a method    0-dim tensors (energy, overlap, the limiter's norm, ...) of 512 bytes each
    tables             those of 8-bit codes (49 KiB), of normal numbers (256 KiB) count as state
    norms, rest        follow `optimizer.rest`, 8-bit moments below 4096 elements being float32
    held sums          float32 in every mode, for a bf16 sum loses small gradients
    element-wise work  kernels on slices of 2^21 elements, of which some are float32
    gradient of x      float32 in the loss, for every slice of the vocabulary would round it again
    gradient handed    an input gradient is freed before its matrix is handed over
    attention          in deterministic mode, which exact resume needs: scratch for every share of
                       the processors
    refresh            CholeskyQR in float64
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.config.schema import ModelConfig

SLICE = 2**21  # elements of element-wise work at a time
CODES_SLICE = 2**24  # elements of 8-bit weights that are made bf16 at a time
VOCABULARY_SLICE = 4096  # rows
GROUP = 128  # elements of 8-bit weights that share a scale
LOSS_AND_NORM = 1024


def r5(size: int) -> int:
    """Rounded up as the allocator does."""
    return -(-size // 512) * 512


@dataclass(frozen=True)
class Case:
    """A configuration; rest: moments of embedding, head and norms."""

    model: ModelConfig
    sequences: int
    length: int
    method: str
    rank: int
    moments: str
    rest: str
    weights: str = "bf16"
    level: str = "full"
    mode: str = "fused"
    micro_batches: int = 1
    svd: bool = False  # the exact solver

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


Shape = tuple[int, int]


def matrices(model: ModelConfig) -> dict[str, Shape]:
    """Of one block, in the order in which backward hands their gradients over."""
    h, f, kv = model.hidden_size, model.intermediate_size, model.key_value_width
    return {
        "down": (h, f),
        "up": (f, h),
        "gate": (f, h),
        "o": (h, h),
        "v": (kv, h),
        "k": (kv, h),
        "q": (h, h),
    }


# Persistent bytes --------------------------------------------------------------------------------


def moments(elements: int, form: str) -> int:
    """Two moments."""
    if form == "8bit" and elements >= 4096:
        return 2 * r5(elements) + 2 * r5(4 * -(-elements // 256))
    return 2 * r5((2 if form == "bf16" else 4) * elements)


def weight(m: int, n: int, form: str) -> int:
    if form == "bf16":
        return r5(2 * m * n)
    groups = -(-m * n // GROUP)
    return r5(m * n) + r5(4 * groups) + r5(groups)


def matrix_state(case: Case, m: int, n: int) -> int:
    """States of one projected matrix."""
    big, small = max(m, n), min(m, n)
    r, limiter, svd_log = min(case.rank, small), 2 * 512, 3 * 512
    low = moments(big * r, case.moments)
    basis = r5(2 * small * r) + svd_log
    match case.method:
        case "adamw":
            return moments(m * n, case.moments)
        case "galore":
            return low + basis
        case "fira":
            return low + basis + limiter
        case "frugal":
            return low + r5(4 * small * r) + svd_log
        case "natural_galore":  # history of 4 in bf16, its Gram matrix in float64, and a log
            return low + basis + r5(2 * 4 * (-(-big * r // 256) * 256)) + 512 + 512
        case "apollo" | "apollo_mini":
            return low + limiter
        case "cosmos":  # the basis lies on the second dimension
            momentum = r5((2 if case.moments == "bf16" else 4) * m * n)
            return momentum + r5(4 * n * r) + r5(4 * r * r) + r5(4 * m * r) + 2 * 512
    raise ValueError(case.method)


def tables(case: Case) -> int:
    """Of 8-bit codes, for either sign 256 values and 5890 buckets; quantiles of a random basis."""
    eight_bit = "8bit" in (case.moments, case.rest)
    drawn = case.method != "adamw"
    return (2 * (1024 + r5(4 * 5890)) if eight_bit else 0) + (4 * 2**16 if drawn else 0)


def persistent(case: Case) -> int:
    """Weights and states."""
    model = case.model
    h, ends = model.hidden_size, model.vocab_size * model.hidden_size
    norm = r5(2 * h) + moments(h, case.rest)
    block = 2 * norm
    for m, n in matrices(model).values():
        block += weight(m, n, case.weights) + matrix_state(case, m, n)
    rest = 2 * (r5(2 * ends) + moments(ends, case.rest)) + norm
    return model.num_hidden_layers * block + rest + tables(case)


# Temporaries of an update, the gradient not counted ----------------------------------------------


def written(rows: int, width: int) -> int:
    """Writing a step into the weight: a float32 copy of some rows, and the rows of a product."""
    return 6 * min(rows, max(1, SLICE // width)) * width


def adam(elements: int, form: str) -> int:
    """The gradient's slice in float32; of bf16 moments also both of them and the direction."""
    return (16 if form == "bf16" else 4) * min(elements, SLICE)


def dense(rows: int, width: int, form: str, weights: str = "bf16", summed: bool = False) -> int:
    """Adam on rows of a weight, of which a float32 slice is there throughout.

    summed: of a float32 sum, whose slices need no copy.
    """
    c = min(rows, max(1, SLICE // width)) * width
    return max((0 if summed else 4 * c) + adam(c, form), written(rows, width))


def direction(low: int, form: str) -> int:
    """Adam in the subspace: the projection in bf16, and its direction whole in float32."""
    return r5(2 * low) + r5(4 * low) + adam(low, form)


def refresh(case: Case, m: int, n: int) -> int:
    big, small = max(m, n), min(m, n)
    r = min(case.rank, small)
    if case.svd:  # a float32 copy, the factors, and what the solver is assumed to take
        factors = r5(4 * m * small) + r5(4 * small) + r5(4 * small * n)
        return r5(4 * m * n) + factors + 4 * (2 * m * n + 4 * small * small)
    thin = small * r
    product = 4 * thin + 2 * thin + r5(2 * big * r) + 2 * thin
    return max(product, 24 * thin + 16 * r * r)  # float64: the product, Q, Gram matrix and factor


def received(case: Case, m: int, n: int) -> int:
    """In backward, beside the gradient of a matrix, when it is `fused`."""
    form, low = case.weights, max(m, n) * min(case.rank, m, n)
    match case.method:
        case "adamw":
            return dense(m, n, case.moments, form)
        case "galore":  # the projection is alive until the end, the direction in bf16 beside it
            step = 2 * r5(2 * low) + written(m, n)
            return max(direction(low, case.moments), step, refresh(case, m, n))
        case "fira":
            step = r5(2 * low) + written(m, n)
            return max(direction(low, case.moments), step, refresh(case, m, n))
        case "apollo" | "apollo_mini":
            return max(direction(low, case.moments), written(m, n))
    raise ValueError(case.method)


# The peak ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Bytes of what lives during a step, in the letters of the formulas."""

    X: int
    K: int
    F: int
    E: int
    p: int
    base: int
    scratch: int  # of attention's backward

    @property
    def A(self) -> int:
        return self.p + 2 * self.X + 2 * self.K + self.E + 1024

    @property
    def M(self) -> int:
        return self.p + 2 * self.F

    def kept(self, level: str) -> int:
        """By one block, its input included."""
        extra = {"full": 0, "attn": self.X + self.A, "keep": self.X + self.A + self.M}
        return self.X + extra[level]


def sizes(case: Case) -> Sizes:
    model, n = case.model, case.tokens
    heads, width = model.num_attention_heads, model.head_dim
    rotation = 2 * r5(4 * case.length * width // 2)
    padded = -(-case.length // 128) * 128
    shares = -(-132 // (case.sequences * heads))
    scratch = 4 * case.sequences * heads * padded * (-(-width // 32) * 32 * shares + 1)
    if model.num_key_value_heads != heads:
        scratch += 2 * 2 * n * model.hidden_size
    return Sizes(
        X=r5(2 * n * model.hidden_size),
        K=r5(2 * n * model.key_value_width),
        F=r5(2 * n * model.intermediate_size),
        E=r5(4 * n * heads),
        p=r5(4 * n),
        base=rotation + 2 * r5(8 * n) + LOSS_AND_NORM,
        scratch=scratch,
    )


def dequantised(case: Case, m: int, n: int) -> int:
    if case.weights == "bf16":
        return 0
    return 2 * min(m, max(1, CODES_SLICE // n)) * n


Instant = tuple[str, int, str]
"""(name, bytes, the matrix that is handed over at it or none)"""


def backward(case: Case, below: int) -> Iterator[Instant]:
    """Of one block with `below` bytes kept by those before it."""
    s, model = sizes(case), case.model
    g = {name: r5(2 * m * n) for name, (m, n) in matrices(model).items()}
    made = {name: dequantised(case, m, n) for name, (m, n) in matrices(model).items()}
    b = below + 3 * s.X + s.A + s.M
    o = below + 2 * s.X + s.A
    c = below + 5 * s.X + s.p + 2 * s.K
    yield "down made", b + s.F + g["down"] + made["down"], ""
    yield "down", b + s.F + g["down"], "down"
    yield "up made", b + 2 * s.X + max(made["up"], g["up"]), ""
    yield "up", b - s.F + 2 * s.X + g["up"], "up"
    yield "gate made", b - s.F + 2 * s.X + max(made["gate"], g["gate"]), ""
    yield "gate", b - 2 * s.F + s.X + g["gate"], "gate"
    yield "o made", o + s.X + g["o"] + made["o"], ""
    yield "o", o + s.X + g["o"], "o"
    yield "attention", o + 2 * s.X + 2 * s.K + s.scratch, ""
    yield "v", c - s.K + g["v"], "v"
    yield "k", c - 2 * s.K + g["k"], "k"
    yield "q", c - s.X - 2 * s.K + g["q"], "q"


def loss(case: Case, kept: int) -> Iterator[Instant]:
    """Of final norm and head over what all blocks keep."""
    s, h = sizes(case), case.model.hidden_size
    logits = r5(2 * case.tokens * VOCABULARY_SLICE)
    exact = 4 * min(case.tokens * VOCABULARY_SLICE, SLICE)  # a piece of it in float32
    rows = r5(2 * VOCABULARY_SLICE * h)
    yield "sums", kept + 2 * s.X + 5 * s.p + logits + exact, ""
    there = kept + 4 * s.X + 3 * s.p  # x, y, and the gradient of y in float32
    yield "gradient", there + logits + exact, ""
    yield "head made", there + logits + rows, ""
    yield "head", there + rows, "head"


def embedding(case: Case) -> Iterator[Instant]:
    s, h = sizes(case), case.model.hidden_size
    rows = r5(2 * VOCABULARY_SLICE * h)
    yield "embedding made", 3 * s.X + 3 * rows + 3 * r5(8 * case.tokens), ""
    yield "embedding", 3 * s.X + rows, "embedding"


def instants(case: Case) -> Iterator[tuple[Instant, int]]:
    """(instant, how many blocks' gradients are there already) of one micro-batch."""
    s, blocks = sizes(case), case.model.num_hidden_layers
    below = (blocks - 1) * s.kept(case.level)
    everything = s.kept("keep")  # the last block keeps all whatever its level
    h, f = case.model.hidden_size, case.model.intermediate_size
    yield ("forward", below + everything + s.F + s.X + dequantised(case, h, f), ""), 0
    for instant in loss(case, below + everything):
        yield instant, 0
    for index in range(blocks):
        for instant in backward(case, below - index * s.kept(case.level)):
            yield instant, index
    for instant in embedding(case):
        yield instant, blocks


def held(case: Case, name: str) -> int:
    """Kept of one gradient until the update, or between micro-batches."""
    each = 2 if case.micro_batches == 1 else 4
    if name in ("head", "embedding"):
        return r5(each * case.model.vocab_size * case.model.hidden_size)
    m, n = matrices(case.model)[name]
    if case.mode == "fused+subspace" and case.method == "galore":
        return r5(each * max(m, n) * min(case.rank, m, n))
    return r5(each * m * n)


def peak(case: Case) -> tuple[int, str]:
    """(tensors at the worst moment of an update, its name)."""
    parts = dict.fromkeys((*matrices(case.model), "head", "embedding"), 0)
    if case.mode != "fused":
        parts = {name: held(case, name) for name in parts}
    names = list(matrices(case.model))
    block = sum(parts[name] for name in names)
    blocks = case.model.num_hidden_layers
    total = blocks * block + parts["head"] + parts["embedding"]
    found: list[tuple[int, str]] = []
    last = case.micro_batches > 1
    for (name, size, handed), done in instants(case):
        extra = _added(case, handed)
        if last or case.mode == "fused":  # the sums are there already
            found.append((total + size + extra, name))
            continue
        before = done * block + (0 if name in ("forward", "sums") else parts["head"])
        if handed in names:
            before += sum(parts[each] for each in names[: names.index(handed)])
        if name.startswith("embedding"):
            before = total
        found.append((before + size + extra, name))
    if case.mode != "fused":
        found += _steps(case, parts, total)
    if case.mode == "fused+subspace" and last:
        found += _first_pass(case, parts, block)
    size, name = max(found)
    return persistent(case) + sizes(case).base + size, name


def _rest_rows(case: Case) -> int:
    return dense(VOCABULARY_SLICE, case.model.hidden_size, case.rest)


def _added(case: Case, handed: str) -> int:
    """What the optimizer takes when a gradient is handed over (in the last micro-batch)."""
    if not handed:
        return 0
    if handed in ("head", "embedding"):
        return _rest_rows(case) if case.mode == "fused" else 0
    m, n = matrices(case.model)[handed]
    if case.mode == "fused":
        return received(case, m, n)
    if case.mode == "fused+subspace" and case.method == "galore":
        low = r5(2 * max(m, n) * min(case.rank, m, n))
        return low if case.micro_batches > 1 else max(low, refresh(case, m, n))
    return 0


def _steps(case: Case, parts: dict[str, int], total: int) -> Iterator[tuple[int, str]]:
    """The update at the end, weight by weight; what was held of one is freed by its own."""
    s = sizes(case)
    gone = 2 * r5(8 * case.tokens)  # the batch
    model = case.model
    ends = dense(model.vocab_size, model.hidden_size, case.rest, summed=case.micro_batches > 1)
    left = total - gone
    yield left + ends, "step of embedding"
    left -= parts["embedding"]
    assert s.base > gone
    for _ in range(model.num_hidden_layers):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            yield left + _stepped(case, name), f"step of {name}"
            left -= parts[name]
    yield left + ends, "step of head"


def _stepped(case: Case, name: str) -> int:
    m, n = matrices(case.model)[name]
    low = max(m, n) * min(case.rank, m, n)
    if case.method == "galore" and case.mode == "fused+subspace":  # the sum is the projection
        back = r5(2 * low) + written(m, n)
        summed = r5(4 * low) + (adam(low, case.moments) - 4 * min(low, SLICE))
        return max(summed, back)
    if case.method == "adamw":
        return dense(m, n, case.moments, case.weights, summed=case.micro_batches > 1)
    return received(case, m, n)


def _first_pass(case: Case, parts: dict[str, int], block: int) -> Iterator[tuple[int, str]]:
    """Of several: the subspace is chosen while the sums come into being."""
    s, blocks = sizes(case), case.model.num_hidden_layers
    below = (blocks - 1) * s.kept(case.level)
    for index in range(blocks):
        at = parts["head"] + index * block
        for name, size, handed in backward(case, below - index * s.kept(case.level)):
            if handed:
                m, n = matrices(case.model)[handed]
                new = r5(2 * max(m, n) * min(case.rank, m, n)) + parts[handed]
                yield at + size + max(refresh(case, m, n), new), f"first {name}"
                at += parts[handed]
