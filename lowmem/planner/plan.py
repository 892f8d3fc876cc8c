"""What the planner answers: the choice, its memory, and why the others were not taken.

`Plan.to_json` is the published form of `plan.json` and of `lowmem plan --json`.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, WithJsonSchema

from lowmem.config.schema import (
    BoundaryPlace,
    Config,
    Ends,
    Logits,
    Matmul,
    StatePlace,
    SumFormat,
    UpdateMode,
    WeightFormat,
    settled,
)
from lowmem.planner.advice import advice
from lowmem.planner.quality import Penalty
from lowmem.planner.workspaces import CUBLAS_WORKSPACE
from lowmem.units import format_bytes

SCHEMA_VERSION: Literal[3] = 3
Rank = Annotated[
    Any,  # for mypy, since ranks come from options that have no type until their method is built
    WithJsonSchema({"type": ["integer", "number", "object", "null"]}),
]
"""A number, a fraction of a side, a table of them by role, or None."""
INSTEAD = " instead of "  # in a note: something became other than what one would expect


@dataclass(frozen=True)
class Rates:
    """tflops: bf16 products summed in float32. bandwidth: GB/s. watts: power limit, if known.

    All of `card` in cards.toml, which are peaks; measured: the first two are what it reached.
    """

    card: str
    tflops: float
    bandwidth: float
    measured: bool = False
    watts: float | None = None


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
    rank: Rank
    states: str
    weights: WeightFormat
    update: UpdateMode
    recompute: str  # config/recompute.py
    micro_batch: int
    accumulate: int  # micro-batches per update
    clip: float | None
    logits: Logits = "recompute"
    ends: Ends = "exact"  # embedding and head
    sums: SumFormat = "fp32"  # of gradients, over micro-batches
    boundaries: BoundaryPlace = "keep"  # inputs of blocks until their backward
    place: StatePlace = "device"  # of states
    blocks: StatePlace = "device"  # of their weights
    compiled: bool = False  # element-wise pieces of blocks
    matmul: Matmul = "exact"  # of their linear layers

    def sentence(self) -> str:
        """One line for people, from the method to the micro-batch."""
        rank = "" if self.rank is None else f" rank {self.rank}"
        ends = " and ends" if self.ends == "int8" else ""
        logits = ", logits kept" if self.logits == "keep" else ""
        logits += ", compiled" if self.compiled else ""
        logits += f", {self.matmul} products" if self.matmul != "exact" else ""
        summed = "" if self.sums in ("fp32", "host") else f", {self.sums} sums"
        away = [name for name, where in self.away() if where == "host"]
        host = f", {', '.join(away)} on the host" if away else ""
        return (
            f"{self.method}{rank}, {self.states} states, {self.weights} weights{ends}, "
            f"{self.update}{host}, recompute {self.recompute}{logits}, "
            f"micro-batch {self.micro_batch} x {self.accumulate}{summed}, "
            f"clip {'off' if self.clip is None else self.clip}"
        )

    def away(self) -> list[tuple[str, str]]:
        """(what, where it lives) of what may live in host memory."""
        return [
            ("block inputs", self.boundaries),
            ("states", self.place),
            ("weights of blocks", self.blocks),
            ("sums of gradients", self.sums),
        ]


@dataclass(frozen=True)
class PhasePeak:
    """The highest moment of one kind of phase: forward, loss, backward, refresh, update, ...

    tensors, parts: bytes then. instant: that moment as a sentence.
    """

    phase: str
    tensors: int
    parts: dict[str, int]
    instant: str


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one update, in bytes (docs/memory.md: four numbers, never one).

    tensors: live storages at the worst moment. allocated: `max_memory_allocated`. reserved:
    `max_memory_reserved`. parts: what the tensors at that moment are for; sums to `tensors`.
    instant: the worst moment as a sentence. phases: the worst moment of every kind, the highest
    first. host: pinned memory of the host, beside everything else that runs there.
    """

    tensors: int
    allocated: int
    reserved: int
    parts: dict[str, int]
    instant: str
    phases: list[PhasePeak] = field(default_factory=list)
    host: int = 0


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

    def sentence(self, width: int = 0) -> str:
        """One line, the flags padded to `width`."""
        fits = ", fits" if self.fits else ""
        return f"{self.flags:{width}}  -{format_bytes(self.saves)}{fits}"


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
    checkpoint_bytes: int = 0  # weights and states of one checkpoint

    @property
    def fits(self) -> bool:
        return self.memory.reserved <= self.card.usable_bytes

    @property
    def fix_lines(self) -> list[str]:
        """The fixes, aligned."""
        width = max((len(fix.flags) for fix in self.fixes), default=0)
        return [fix.sentence(width) for fix in self.fixes]

    @property
    def training_seconds(self) -> float | None:
        """Of all updates."""
        if self.speed is None:
            return None
        return settled(self.config.train.updates) * self.speed.seconds_per_update

    @property
    def training_kwh(self) -> float | None:
        """Energy of all updates at the card's power limit: an upper bound for the card alone."""
        seconds, rates = self.training_seconds, self.card.rates
        if seconds is None or rates is None or rates.watts is None:
            return None
        return seconds * rates.watts / 3.6e6

    @property
    def device_bytes(self) -> int:
        """What the card will have lost: reserved, context and what others use."""
        return self.memory.reserved + self.card.context + self.card.others

    @property
    def advice(self) -> list[str]:
        """What the stored figures say about where memory could be saved."""
        return advice(self)

    @property
    def departures(self) -> list[str]:
        """Notes that something became other than one would expect; they are shown first."""
        return [note for note in self.notes if INSTEAD in note]

    def to_json(self) -> dict[str, Any]:
        """The published form: plain numbers, strings, lists and tables."""
        published = PublishedPlan(
            schema_version=SCHEMA_VERSION,
            fits=self.fits,
            usable_bytes=self.card.usable_bytes,
            peak_bytes=self.memory.reserved,
            tensor_bytes=self.memory.tensors,
            allocated_bytes=self.memory.allocated,
            device_bytes=self.device_bytes,
            checkpoint_bytes=self.checkpoint_bytes,
            host_bytes=self.memory.host,
            instant=self.memory.instant,
            parts=self.memory.parts,
            phases=self.memory.phases,
            choice=self.choice,
            quality=self.quality,
            speed=self.speed,
            training_seconds=self.training_seconds,
            training_kwh=self.training_kwh,
            candidates=self.candidates,
            fixes=self.fixes,
            advice=self.advice,
            card=self.card,
            config=self.config,
            notes=self.notes,
        )
        record: dict[str, Any] = _published_form().dump_python(published, mode="json")
        return record

    @staticmethod
    def from_json(record: Any) -> "Plan":
        """The plan whose published form this is. ValueError: it is no plan of this version."""
        published = _published_form().validate_python(record)
        memory = Memory(
            published.tensor_bytes,
            published.allocated_bytes,
            published.peak_bytes,
            published.parts,
            published.instant,
            published.phases,
            published.host_bytes,
        )
        return Plan(
            published.config,
            published.card,
            published.choice,
            memory,
            published.candidates,
            published.fixes,
            published.notes,
            published.speed,
            published.quality,
            published.checkpoint_bytes,
        )


@dataclass(frozen=True)
class PublishedPlan:
    """A plan of lowmem, as `lowmem plan --json` prints it and as a run's plan.json holds it.

    fits: peak_bytes are at most usable_bytes. peak_bytes, allocated_bytes, tensor_bytes: what the
    allocator reserves, has allocated, and what is in live tensors, at most. device_bytes: what the
    card will have lost. checkpoint_bytes: on the disk. host_bytes: of host memory that is pinned.
    instant, parts: the worst moment and what its tensors are for; phases: the same for every kind
    of phase, the highest first. choice: the settings that decide memory. quality: penalty against
    tuned AdamW. speed, training_seconds: estimates, null where no rates are known; training_kwh: at
    the card's power limit, null where it is not known. candidates: the alternatives and why they
    were not taken. fixes: flags that save memory, where nothing fits. advice: where memory could be
    saved. config: the whole settled configuration. notes: what nobody gave, and why it became this.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    schema_version: Literal[3]
    fits: bool
    usable_bytes: int
    peak_bytes: int
    tensor_bytes: int
    allocated_bytes: int
    device_bytes: int
    checkpoint_bytes: int
    host_bytes: int
    instant: str
    parts: dict[str, int]
    phases: list[PhasePeak]
    choice: Choice
    quality: Penalty | None
    speed: Speed | None
    training_seconds: float | None
    training_kwh: float | None
    candidates: list[Candidate]
    fixes: list[Fix]
    advice: list[str]
    card: Card
    config: Config
    notes: list[str]


@cache
def _published_form() -> TypeAdapter[PublishedPlan]:
    return TypeAdapter(PublishedPlan)


def json_schema() -> dict[str, Any]:
    """The JSON schema of `Plan.to_json`: docs/plan.schema.json."""
    schema = _published_form().json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
