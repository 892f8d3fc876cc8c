"""What a configuration needs on a card, and how fast it is there.

Peaks of tensors are composed (`compose.py`): exact, a millisecond each once the parts are known.
What the allocator makes of them is guessed for the search and replayed for the choice.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.recompute import levels_of
from lowmem.config.schema import (
    Config,
    Ends,
    Logits,
    ModelConfig,
    OptimizerConfig,
    StatePlace,
    SumFormat,
    UpdateMode,
    WeightFormat,
    settled,
)
from lowmem.errors import ConfigError
from lowmem.kernels.attention import choose_backend
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.method import Reallocating
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.allocator import expandable_segments, replay
from lowmem.planner.candidates import Kind
from lowmem.planner.compose import compose
from lowmem.planner.model_bytes import ModelBytes, model_bytes
from lowmem.planner.optimizer_bytes import OptimizerBytes, optimizer_bytes
from lowmem.planner.persistent import persistent_bytes, stored_bytes
from lowmem.planner.plan import Card, Choice, Memory, Rates
from lowmem.planner.rehearse import (
    VISITED,
    Rehearsal,
    model_on_meta,
    optimizer_on_meta,
    rehearse,
    standing_for,
)
from lowmem.planner.speed import Timed, seconds
from lowmem.planner.ways import Way, clip_of
from lowmem.units import MIB

# Where no rates are known settings must still be compared: by those of a common machine.
COMMON_RATES = {"cuda": Rates("a common card", 80, 600), "cpu": Rates("a common CPU", 0.2, 30)}


@dataclass
class Job:
    """What is planned: a configuration on a card, with everything that was rehearsed for it."""

    config: Config
    card: Card
    model: ModelConfig
    rows: int
    seq_len: int
    attention: str
    _models: dict[Any, ModelBytes] = field(default_factory=dict)
    _optimizers: dict[Any, OptimizerBytes] = field(default_factory=dict)
    _memories: dict[str, Memory] = field(default_factory=dict)
    _missed: dict[UpdateMode, int] = field(default_factory=dict)
    _persistent: dict[str, int] = field(default_factory=dict)
    _llamas: dict[tuple[WeightFormat, Ends, int, StatePlace], Llama] = field(default_factory=dict)

    @staticmethod
    def of(config: Config, card: Card) -> "Job":
        model = resolve_model(config.model, Path.cwd())
        seq_len = settled(config.data.seq_len)
        rows = rows_of(config.train.batch, seq_len)
        micro = config.train.micro_batch
        if micro != "auto" and settled(micro) > rows:
            raise ConfigError(
                f"train.micro_batch = {micro} is more than the batch of {rows} sequences",
                "a micro-batch is a part of the batch",
                f"--micro-batch {rows}, or a larger --batch",
            )
        if config.train.recompute != "auto":
            _check_recompute(config.train.recompute, model.num_hidden_layers)
        given = config.train.weights
        weights: WeightFormat = "bf16" if given == "auto" else settled(given)
        dtype = compute_dtype(weights, config.train.device)
        attention = choose_backend("auto", torch.device(config.train.device), dtype, model.head_dim)
        return Job(config, card, model, rows, seq_len, attention)

    @property
    def workspace(self) -> int:
        """Bytes that libraries hold throughout a run on this device."""
        return 0 if self._on_cpu else self.card.workspace

    @property
    def _on_cpu(self) -> bool:
        return self.config.train.device == "cpu"

    def choice(self, kind: Kind, way: Way, recompute: str, logits: Logits, micro: int) -> Choice:
        """These settings as a Choice, with micro-batches made equal in size."""
        accumulate = math.ceil(self.rows / micro)
        return Choice(
            kind.method,
            kind.rank,
            kind.states,
            kind.weights,
            way.update,
            recompute,
            micro if self.config.train.micro_batch != "auto" else math.ceil(self.rows / accumulate),
            accumulate,
            clip_of(self.config, way.update),
            logits,
            kind.ends,
            self._sums(kind, way, accumulate),
            way.boundaries,
            way.place,
            way.blocks,
            self.config.train.compile,
            self.config.train.matmul,
        )

    def optimizer(self, kind: Kind) -> OptimizerConfig:
        """What is rehearsed is what will be trained: the sheet's settings included."""
        return kind.optimizer(self.config.optimizer, self.model.parameters)

    def fits(self, choice: Choice, room: int) -> bool:
        """Does the peak stay within `room` bytes? What is cheap to know is asked first."""
        return (
            self.persistent(kind_of(choice), choice.place, choice.blocks) <= room
            and self.peak(choice) <= room
        )

    def _sums(self, kind: Kind, way: Way, accumulate: int) -> SumFormat:
        """Those of one block at a time are exact, and one micro-batch has none."""
        if way.update == "layer-major":
            return "fp32"
        return kind.sums if accumulate > 1 or self.config.train.sums != "auto" else "fp32"

    def persistent(
        self, kind: Kind, place: StatePlace = "device", blocks: StatePlace = "device"
    ) -> int:
        """Weights and states that live on the device, and what libraries hold."""
        kind = replace(kind, sums="fp32")
        key = f"{kind!r} {place} {blocks}"  # a rank may be a table, which has no hash
        if key not in self._persistent:
            owner = self._owner(
                kind, "unfused", "fp32", place, blocks
            )  # any mode: states are the same
            self._persistent[key] = persistent_bytes(owner, self.model.num_hidden_layers)
        return self._persistent[key] + self.workspace

    def stored(self, choice: Choice) -> int:
        """Weights and states in one checkpoint."""
        owner = self._owner(replace(kind_of(choice), sums="fp32"), "unfused")
        return stored_bytes(owner, self.model.num_hidden_layers)

    def sums(self, choice: Choice) -> int:
        """What is held between the micro-batches of an update."""
        if choice.accumulate == 1:
            return 0
        return self._optimizer_bytes(choice).held

    def host(self, choice: Choice) -> int:
        """Bytes of host memory beside the card's: sums that lie there, and in other orders than
        layer-major inputs of blocks."""
        inputs = self._model_bytes(choice).host * (self.model.num_hidden_layers - 1)
        return inputs + (self._optimizer_bytes(choice).host if choice.accumulate > 1 else 0)

    def peak(self, choice: Choice) -> int:
        """Bytes that the allocator will have reserved at the peak, the last of them guessed."""
        beside = self.host(choice) if self._on_cpu else 0  # of the same memory
        return self._reserved(self.tensors(choice)) + beside + self._missed.get(choice.update, 0)

    def tensors(self, choice: Choice) -> int:
        """Bytes of live tensors at the peak: exact but for estimates of the curvature, which are
        passes of their own."""
        parts = self._model_bytes(choice), self._optimizer_bytes(choice)
        return compose(*parts, choice.recompute, self.model.num_hidden_layers) + self.workspace

    def seconds(self, choice: Choice) -> float:
        """Of an update, for comparisons: by the card's rates, or by those of a common one."""
        rates = self.card.rates or COMMON_RATES[settled(self.config.train.device)]
        return sum(seconds(self.timed(choice), rates).values())

    def timed(self, choice: Choice) -> Timed:
        optimizer = self.optimizer(kind_of(choice))
        return Timed(self.model, optimizer, choice, self.rows, self.seq_len)

    def memory(self, choice: Choice) -> Memory:
        """The whole model rehearsed, its allocations replayed."""
        key = repr(choice)
        if key not in self._memories:
            self._memories[key] = self._replayed(choice)
        return self._memories[key]

    def learn(self, choice: Choice) -> None:
        """Guess what the allocator takes in that update mode by what it takes for this choice."""
        missed = self.memory(choice).reserved - self.peak(choice)
        self._missed[choice.update] = self._missed.get(choice.update, 0) + max(0, missed)

    def _replayed(self, choice: Choice) -> Memory:
        full = self._rehearsal(choice)
        told = full.parts, full.instant, full.phases
        if self._on_cpu:  # the host's allocator returns what it does not use
            return Memory(full.tensors, full.tensors, full.tensors + full.host, *told, full.host)
        peaks = replay(full.events, expandable=expandable_segments())
        return Memory(full.tensors, peaks.allocated, peaks.reserved, *told, full.host)

    def _rehearsal(self, choice: Choice) -> Rehearsal:
        return rehearse(
            self.model,
            self.optimizer(kind_of(choice)),
            choice,
            self.seq_len,
            attention=self.attention,
            workspace=self.workspace,
            updates=1 if expandable_segments() else 2,
        )

    def _model_bytes(self, choice: Choice) -> ModelBytes:
        formats, order = (choice.weights, choice.ends), _order_of(choice)
        key = (formats, choice.logits, choice.micro_batch, choice.accumulate > 1, order)
        if key not in self._models:
            self._models[key] = model_bytes(self.model, choice, self.seq_len, self.attention)
        return self._models[key]

    def _optimizer_bytes(self, choice: Choice) -> OptimizerBytes:
        kind, clipped = kind_of(choice), choice.clip is not None
        visited = min(choice.accumulate, VISITED[choice.update])
        places = choice.sums, choice.place, choice.blocks
        key = (repr(kind), choice.update, visited, clipped, places)
        if key not in self._optimizers:
            pieces = self._model_bytes(choice).pieces
            self._optimizers[key] = optimizer_bytes(
                self._owner(kind, choice.update, *places),
                choice,
                pieces,
                self.attention,
                self.model.num_hidden_layers,
            )
        return self._optimizers[key]

    def _owner(
        self,
        kind: Kind,
        mode: UpdateMode,
        sums: SumFormat = "fp32",
        place: StatePlace = "device",
        blocks: StatePlace = "device",
    ) -> Optimizer:
        """The optimizer of a model of two blocks; of the whole where moments move between them."""

        def of(count: int) -> Optimizer:
            llama = self._llama(kind, count, blocks)
            with standing_for(self.attention):
                return optimizer_on_meta(llama, self.optimizer(kind), mode, sums, place)

        owner = of(2)
        if any(isinstance(slot.method, Reallocating) for slot in owner.slots.values()):
            return of(self.model.num_hidden_layers)
        return owner

    def _llama(self, kind: Kind, count: int, blocks: StatePlace) -> Llama:
        count = min(count, self.model.num_hidden_layers)
        key = kind.weights, kind.ends, count, blocks
        if key not in self._llamas:
            model = self.model.model_copy(update={"num_hidden_layers": count})
            self._llamas[key] = model_on_meta(
                model, kind.weights, "keep", self.attention, ends=kind.ends, blocks=blocks
            )
        return self._llamas[key]

    def _reserved(self, tensors: int) -> int:
        if self._on_cpu:
            return tensors
        return round(1.003 * tensors) + 40 * MIB  # whole pages; the replay of the winner decides


def _check_recompute(recompute: str, blocks: int) -> None:
    try:
        levels_of(recompute, blocks)
    except ValueError as error:
        raise ConfigError(
            f"train.recompute = {recompute!r}", str(error), "--recompute full"
        ) from None


def _order_of(choice: Choice) -> tuple[Any, ...]:
    """What else the model's bytes depend on, in layer-major order and in another."""
    if choice.update == "layer-major":
        return choice.boundaries, choice.blocks, choice.accumulate
    return (choice.boundaries,)


def kind_of(choice: Choice) -> Kind:
    sums: SumFormat = choice.sums if choice.accumulate > 1 else "fp32"
    return Kind(choice.method, choice.rank, choice.states, choice.weights, choice.ends, sums)
