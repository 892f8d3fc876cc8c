"""What a configuration needs on a card: quick estimates for the search, the exact peak at the end.

Estimates come from two rehearsals with three and four blocks, extended to the model's depth; the
exact peak from the whole model, with its allocations replayed through the allocator.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, Level, ModelConfig, OptimizerConfig, UpdateMode, settled
from lowmem.errors import ConfigError
from lowmem.kernels.attention import choose_backend
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.allocator import expandable_segments, replay
from lowmem.planner.candidates import Kind, clip_of
from lowmem.planner.plan import Card, Choice, Memory
from lowmem.planner.rehearse import DTYPES, GRANULE, Rehearsal, rehearse
from lowmem.units import MIB

_SHALLOW = (3, 4)  # blocks of the two estimating rehearsals


@dataclass
class Job:
    """What is planned: a configuration on a card, with estimates that were made already."""

    config: Config
    card: Card
    model: ModelConfig
    rows: int
    seq_len: int
    attention: str
    _tensors: dict[tuple[str, int], int] = field(default_factory=dict)
    _missed: dict[str, int] = field(default_factory=dict)
    _persistents: dict[tuple[str, str, bool], int] = field(default_factory=dict)

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
        dtype = DTYPES[settled(config.train.weights)]
        attention = choose_backend("auto", torch.device(config.train.device), dtype, model.head_dim)
        return Job(config, card, model, rows, seq_len, attention)

    @property
    def workspace(self) -> int:
        """Bytes that libraries hold throughout a run on this device."""
        return 0 if self.config.train.device == "cpu" else self.card.workspace

    def choice(self, kind: Kind, mode: UpdateMode, level: Level, micro: int) -> Choice:
        """These settings as a Choice, with micro-batches made equal in size."""
        accumulate = math.ceil(self.rows / micro)
        return Choice(
            kind.method,
            kind.rank,
            kind.states,
            settled(self.config.train.weights),
            mode,
            level,
            micro if self.config.train.micro_batch != "auto" else math.ceil(self.rows / accumulate),
            accumulate,
            clip_of(self.config, mode),
        )

    def fits(self, choice: Choice, room: int) -> bool:
        """Does the estimated peak stay within `room` bytes? The cheap bound is asked first."""
        return self.bound(choice) <= room and self.peak(choice) <= room

    def bound(self, choice: Choice) -> int:
        """A lower bound without a rehearsal: what persists, and what a backward pass cannot avoid.

        At its beginning the input of every block, at its end every gradient where none is used
        or summed before.
        """
        element = DTYPES[choice.weights].itemsize
        tokens = choice.micro_batch * self.seq_len
        inputs = self.model.num_hidden_layers * tokens * self.model.hidden_size * element
        whole = choice.update == "unfused" and choice.accumulate == 1
        gradients = self.model.parameters * element if whole else 0
        return self.persistent(choice) + max(inputs, gradients)

    def persistent(self, choice: Choice) -> int:
        """Weights, states and held sums: a lower bound, from the method's own `init`."""
        key = (repr(kind_of(choice)), choice.update, choice.accumulate > 1)
        if key not in self._persistents:
            depth = self.model.num_hidden_layers
            one, two = (self._persistent(choice, blocks) for blocks in (1, 2))
            self._persistents[key] = one + (depth - 1) * (two - one)
            if not self._blocks_are_alike(choice):
                self._persistents[key] = self._persistent(choice, depth)
        return self._persistents[key]

    def _blocks_are_alike(self, choice: Choice) -> bool:
        """Does every block of the model hold the same? Not where moments move between weights."""
        return not any(
            hasattr(slot.method, "reallocate")
            for slot in self._owner(choice, blocks=1)[0].slots.values()
        )

    def _owner(self, choice: Choice, blocks: int) -> tuple[Optimizer, dict[str, Tensor]]:
        """(the optimizer when it holds most, its weights) of a model with so many blocks."""
        model = self.model.model_copy(update={"num_hidden_layers": blocks})
        llama = Llama(model, dtype=DTYPES[choice.weights], device="meta", attention=self.attention)
        weights: dict[str, Tensor] = dict(llama.named_parameters())
        optimizer = build_optimizer(
            self._optimizer(choice),
            weights,
            llama.roles(),
            mode=choice.update,
            seed=0,
            head_dim=model.head_dim,
        )
        hold_worst_window(optimizer)
        return optimizer, weights

    def _persistent(self, choice: Choice, blocks: int) -> int:
        optimizer, weights = self._owner(choice, blocks)
        total = sum(_rounded(weight.nbytes) for weight in weights.values())
        total += sum(_rounded(value.nbytes) for _, value in optimizer.state_tensors())
        if choice.accumulate > 1:
            total += sum(_rounded(4 * count) for count in _held(optimizer, choice.update))
        return total + self.workspace

    def _optimizer(self, choice: Choice) -> OptimizerConfig:
        """What is rehearsed is what will be trained: the sheet's settings included."""
        return kind_of(choice).optimizer(self.config.optimizer, self.model.parameters)

    def peak(self, choice: Choice) -> int:
        """Estimated bytes that the allocator will have reserved at the peak.

        The peak is a maximum of lines in the depth, so two depths give a lower bound of it, which
        is nearly always met.
        """
        depth = self.model.num_hidden_layers
        missed = self._missed.get(_family(choice), 0)
        if depth <= _SHALLOW[1] or not self._blocks_are_alike(choice):
            return self._reserved(self._rehearsed(choice, depth)) + missed
        few, more = (self._rehearsed(choice, blocks) for blocks in _SHALLOW)
        return self._reserved(few + (depth - _SHALLOW[0]) * (more - few)) + missed

    def learn(self, choice: Choice, memory: Memory) -> None:
        """Add what this choice's estimate missed to all that differ in the micro-batch only."""
        family = _family(choice)
        missed = memory.reserved - self.peak(choice)
        self._missed[family] = self._missed.get(family, 0) + missed

    def _rehearsed(self, choice: Choice, blocks: int) -> int:
        key = (repr(choice), blocks)  # a rank may be a table, which has no hash
        if key not in self._tensors:
            self._tensors[key] = self._rehearsal(choice, blocks).tensors
        return self._tensors[key]

    def _rehearsal(self, choice: Choice, blocks: int | None = None) -> Rehearsal:
        return rehearse(
            self.model,
            self._optimizer(choice),
            choice,
            self.seq_len,
            attention=self.attention,
            workspace=self.workspace,
            blocks=blocks,
            updates=1 if expandable_segments() else 2,
        )

    def _reserved(self, tensors: int) -> int:
        if self.config.train.device == "cpu":
            return tensors
        return round(1.003 * tensors) + 40 * MIB  # whole pages; the replay of the winner decides

    def memory(self, choice: Choice) -> Memory:
        """The exact peak: the whole model rehearsed, its allocations replayed."""
        full = self._rehearsal(choice)
        if self.config.train.device == "cpu":  # the host's allocator returns what it does not use
            return Memory(full.tensors, full.tensors, full.tensors, full.parts, full.instant)
        peaks = replay(full.events, expandable=expandable_segments())
        return Memory(full.tensors, peaks.allocated, peaks.reserved, full.parts, full.instant)


def _family(choice: Choice) -> str:
    return repr(replace(choice, micro_batch=0, accumulate=0))


def kind_of(choice: Choice) -> Kind:
    return Kind(choice.method, choice.rank, choice.states)


def _rounded(count: int) -> int:
    return -(-count // GRANULE) * GRANULE


def _held(optimizer: Optimizer, mode: UpdateMode) -> Iterator[int]:
    """Elements held between micro-batches, per weight."""
    for slot in optimizer.slots.values():
        whole = mode == "unfused" or slot.method.needs.full_gradient
        yield (slot.weight if whole else slot.method.compress(slot.weight, slot.state)).numel()
