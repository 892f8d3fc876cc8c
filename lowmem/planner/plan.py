"""What the planner answers: the choice, its memory, and why the others were not taken.

`Plan.to_json` is the published form of `plan.json` and of `lowmem plan --json`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem.config.schema import Config, Logits, UpdateMode, WeightFormat, settled
from lowmem.planner.quality import Penalty
from lowmem.planner.workspaces import CUBLAS_WORKSPACE

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Rates:
    """tflops: bf16 products summed in float32. bandwidth: GB/s.

    Both of `card` in cards.toml, which are peaks; measured: what the card reached instead.
    """

    card: str
    tflops: float
    bandwidth: float
    measured: bool = False


@dataclass(frozen=True)
class Card:
    """The memory of one device, in bytes.

    total: as the driver reports it. context: CUDA context and loaded kernels. others: desktop and
    other processes. margin: kept free against what no model sees. source: preset | measured.
    rates: how fast it is, None where unknown. workspace: what cuBLAS holds throughout. calibration:
    the file with the measurement of this card that was used, if any.
    """

    name: str
    total: int
    context: int
    others: int
    margin: int
    source: str
    kind: str = "cuda"  # "cuda", or "cpu" where the budget is host memory
    rates: Rates | None = None
    workspace: int = CUBLAS_WORKSPACE
    calibration: str | None = None
    warnings: tuple[str, ...] = ()  # of calibrations that were ignored

    @property
    def presets(self) -> list[str]:
        """Which of the numbers nobody has measured on this card."""
        if self.kind == "cpu":
            return ["margin"]
        known = {"others"} if self.source == "measured" else set[str]()
        known |= {"context", "workspace"} if self.calibration else set()
        return [name for name in ("context", "others", "margin", "workspace") if name not in known]

    @property
    def usable_bytes(self) -> int:
        """What the allocator may reserve."""
        return self.total - self.context - self.others - self.margin


@dataclass(frozen=True)
class Choice:
    """The settings that decide memory, all concrete."""

    method: str
    rank: Any  # number, fraction, table by role, or None
    states: str
    weights: WeightFormat
    update: UpdateMode
    recompute: str  # config/recompute.py
    micro_batch: int
    accumulate: int  # micro-batches per update
    clip: float | None
    logits: Logits = "recompute"

    def sentence(self) -> str:
        """One line for people, from the method to the micro-batch."""
        rank = "" if self.rank is None else f" rank {self.rank}"
        logits = ", logits kept" if self.logits == "keep" else ""
        return (
            f"{self.method}{rank}, {self.states} states, {self.weights} weights, {self.update}, "
            f"recompute {self.recompute}{logits}, "
            f"micro-batch {self.micro_batch} x {self.accumulate}, "
            f"clip {'off' if self.clip is None else self.clip}"
        )


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one update, in bytes (docs/memory.md: four numbers, never one).

    tensors: live storages at the worst moment. allocated: `max_memory_allocated`. reserved:
    `max_memory_reserved`. parts: what the tensors at that moment are for; sums to `tensors`.
    instant: the worst moment as a sentence.
    """

    tensors: int
    allocated: int
    reserved: int
    parts: dict[str, int]
    instant: str


@dataclass(frozen=True)
class Speed:
    """Estimated time of training alone, without evaluation, saving and reading text.

    parts: of an update's seconds, by what they are for. error: a fraction, to either side.
    """

    tokens_per_second: float
    seconds_per_update: float
    parts: dict[str, float]
    error: float


@dataclass(frozen=True)
class Candidate:
    """One row of the table of alternatives."""

    choice: Choice
    fits: bool
    peak_bytes: int  # reserved; a lower bound where `bound` is true
    bound: bool = False
    reason: str = ""  # why it was not taken
    quality: Penalty | None = None  # by the published evidence


@dataclass(frozen=True)
class Fix:
    """A change that lowers the peak: the flags to add and the bytes they save."""

    flags: str
    saves: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    config: Config  # settled: nothing is "auto" any more
    card: Card
    choice: Choice
    memory: Memory
    candidates: list[Candidate] = field(default_factory=list)
    fixes: list[Fix] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what nobody gave, and why it became this
    speed: Speed | None = None  # None where no rates are known
    quality: Penalty | None = None  # by the published evidence

    @property
    def fits(self) -> bool:
        return self.memory.reserved <= self.card.usable_bytes

    @property
    def training_seconds(self) -> float | None:
        """Of all updates."""
        if self.speed is None:
            return None
        return settled(self.config.train.updates) * self.speed.seconds_per_update

    @property
    def device_bytes(self) -> int:
        """What the card will have lost: reserved, context and what others use."""
        return self.memory.reserved + self.card.context + self.card.others

    def to_json(self) -> dict[str, Any]:
        """The published form: plain numbers, strings, lists and tables."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fits": self.fits,
            "usable_bytes": self.card.usable_bytes,
            "peak_bytes": self.memory.reserved,
            "tensor_bytes": self.memory.tensors,
            "allocated_bytes": self.memory.allocated,
            "device_bytes": self.device_bytes,
            "instant": self.memory.instant,
            "parts": self.memory.parts,
            "choice": asdict(self.choice),
            "quality": None if self.quality is None else asdict(self.quality),
            "speed": None if self.speed is None else asdict(self.speed),
            "training_seconds": self.training_seconds,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "fixes": [asdict(fix) for fix in self.fixes],
            "card": asdict(self.card),
            "config": self.config.model_dump(mode="json"),
            "notes": self.notes,
        }


def recorded_plan(record: Mapping[str, Any], config: Config) -> Plan:
    """The plan of a run's plan.json, without alternatives, speed and quality.

    KeyError, TypeError: the record lacks or misuses something; it was written by another version.
    """
    card = dict(record["card"])
    card["rates"] = None if card["rates"] is None else Rates(**card["rates"])
    memory = Memory(
        record["tensor_bytes"],
        record["allocated_bytes"],
        record["peak_bytes"],
        record["parts"],
        record["instant"],
    )
    card["warnings"] = tuple(card["warnings"])
    return Plan(config, Card(**card), Choice(**record["choice"]), memory)
