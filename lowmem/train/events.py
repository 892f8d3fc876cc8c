"""What a run reports: small records, handed to a function; nothing here prints.

`metrics.jsonl` holds one object per `Trained`, `Evaluated` and `Diagnosed`, `events.jsonl` all the
others.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Started:
    """The first update is about to begin, or (update > 0) the run continues.

    bits_differ_by: what is not as it was when the checkpoint was written.
    """

    update: int
    updates: int
    tokens_per_update: int
    folder: str
    resumed_from: str | None = None
    bits_differ_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Weights that are updated alike. elements: of all of them. method: what it is composed of."""

    roles: str
    weights: int
    elements: int
    method: str


@dataclass(frozen=True)
class Assigned:
    """Which weights have which method."""

    groups: list[Group]


@dataclass(frozen=True)
class Trained:
    """One update. loss: mean per target token, nats. tokens: seen since the run began."""

    update: int
    loss: float
    lr: float
    tokens: int
    grad_norm: float
    norm_of: str  # which norm that is: see Optimizer.norm_of
    seconds: float
    tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True)
class Evaluated:
    """Validation after `update` (0-based). eval_loss: mean per target token, nats.

    published_loss: what the papers' protocol makes of the same losses, which is too low; None:
    another protocol. best: the lowest loss of the run so far, before a resume included.
    """

    update: int
    eval_loss: float
    eval_tokens: int
    seconds: float
    published_loss: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Diagnosed:
    """What the methods note of themselves after `update` (0-based), over all weights.

    kept_bases is a sum, the others are means; None is no number.
    """

    update: int
    diagnostics: dict[str, float | None]


@dataclass(frozen=True)
class Storage:
    """What saving will need, in bytes. checkpoint: one; kept: how many stand on the disk at most.

    host_copy: memory that holds a checkpoint while it is written behind the training; 0: training
    waits for the disk, for the reason `why`.
    """

    checkpoint: int
    kept: int
    free: int
    host_copy: int
    why: str = ""


@dataclass(frozen=True)
class Saved:
    """blocked: seconds that training stood still for it."""

    update: int  # updates done
    path: str
    bytes: int
    seconds: float
    blocked: float


@dataclass(frozen=True)
class Skipped:
    """An update without a step, and what its sequences were: "FILE at TOKEN" each.

    made: weights had moved all the same (`fused` mode). why: of a batch that was never computed,
    the rollback that left it out.
    """

    update: int
    why: str
    made: bool
    sequences: list[str]


@dataclass(frozen=True)
class RolledBack:
    """The run begins again at `update`, and will leave out the batches first to last."""

    update: int
    why: str
    first: int
    last: int
    number: int
    of: int


@dataclass(frozen=True)
class Paused:
    """The run waits: for room on the disk, or for the removal of the file PAUSE."""

    why: str


@dataclass(frozen=True)
class Continued:
    """The wait is over."""

    seconds: float


@dataclass(frozen=True)
class Part:
    """A category of memory, in bytes; measured: None where nothing could measure it."""

    name: str
    planned: int
    measured: int | None


@dataclass(frozen=True)
class Measured:
    """The peak of the first update beside the plan's, in bytes; what: which of the four numbers.

    parts: of the tensors on the CPU, of what is allocated on CUDA.
    """

    what: str
    planned: int
    measured: int
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Grown:
    """Memory of the card grew beyond the plan, seen after `update` (0-based); in bytes.

    whose: "others" (other programs) or "ours".
    """

    update: int
    whose: str
    planned: int
    measured: int


@dataclass(frozen=True)
class Capped:
    """What our allocator may reserve, in bytes: `budget` of the plan and the ballast beyond it."""

    budget: int
    ballast: int
    card: str


@dataclass(frozen=True)
class Tried:
    """An update of random text went through before the run began."""

    seconds: float


@dataclass(frozen=True)
class Eased:
    """The device ran out of memory in `update` (0-based), and the run goes on by other means.

    step: free, slices, logits, recompute, micro-batch or evaluation; said: what it does. where: the
    phase, and reason: PyTorch's word for it; both empty where a step was taken ahead of an error.
    """

    update: int
    step: str
    said: str
    where: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ConvertedPart:
    """A part of a checkpoint that was taken over. error: relative, by norm; of what is rounded."""

    part: str
    exact: bool
    error: float
    becomes: str


@dataclass(frozen=True)
class Converted:
    """The run goes on after `update` updates with other settings than its checkpoint's."""

    update: int
    parts: list[ConvertedPart]


@dataclass(frozen=True)
class Stopping:
    """A signal or the file STOP arrived; the update is finished, saved, and the run ends."""

    signal: str


@dataclass(frozen=True)
class Finished:
    """The end of a run. eased: what it did where memory ran out, in the order of the steps."""

    update: int
    eval_loss: float
    unigram_loss: float  # of the validation tokens under their own frequencies: their entropy
    tokens: int
    seconds: float
    checkpoint: str
    published_loss: float | None = None  # of the last evaluation, as in Evaluated
    eased: list[str] = field(default_factory=list)


Metric = Trained | Evaluated | Diagnosed
Event = (
    Metric
    | Started
    | Assigned
    | Storage
    | Saved
    | Measured
    | Grown
    | Capped
    | Tried
    | Eased
    | Skipped
    | RolledBack
    | Paused
    | Continued
    | Converted
    | Stopping
    | Finished
)
Report = Callable[[Event], None]


def to_record(event: Event) -> dict[str, Any]:
    """The JSON object of an event; everything but metrics also names its kind."""
    record = asdict(event)
    return (
        record if isinstance(event, Metric) else {"event": type(event).__name__.lower(), **record}
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
