"""The dearest moments of a run, before anything can be lost: one update, refresh and all.

Random text of the run's shape goes through a model and an optimizer that are thrown away: the
first update, in which every subspace is chosen and every method is at its largest, one evaluation
batch, and one matrix with its states on its way to the disk. What does not fit says so within
seconds, and not in the night when the first refresh is due.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, settled
from lowmem.data.batches import Batches, on_device
from lowmem.data.shards import TokenStream
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.model.llama import Llama
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.tensorfile import write_tensors
from lowmem.train.evaluate import evaluate
from lowmem.train.snapshot import HostCopy, Position, Snapshot, TensorFile

MICRO_BATCHES = 2  # the second one finds the sums of the first; later ones find the same
Batch = list[tuple[Tensor, Tensor]]


def is_wanted(config: Config) -> bool:
    """Does a run of this configuration begin with a trial? "auto": on a card."""
    trial = config.train.trial
    return config.train.device == "cuda" if trial == "auto" else trial == "on"


def try_out(config: Config, model: Llama, optimizer: Optimizer, rows: int, folder: Path) -> None:
    """Make one update of nothing, evaluate it and save a matrix; both arguments are spoilt.

    rows: sequences of a micro-batch. folder: on the disk of the run; nothing stays in it.
    """
    hold_worst_window(optimizer)
    text = ScratchText.of(config)
    micro_batches = list(islice(text.batches.of(0).micro_batches(rows), MICRO_BATCHES))
    count = -(-rows_of(config.train.batch, text.seq_len) // rows)
    made = scratch_gradients(config, model, optimizer, micro_batches, count, lr=0.0)
    optimizer.step()
    del made  # alive until here, as in training
    evaluate(model, text.stream, seq_len=text.seq_len, tokens=rows * text.seq_len, rows=rows)
    _save_largest(optimizer, folder)


@dataclass(frozen=True)
class ScratchText:
    """Random text of a configuration's shape."""

    stream: TokenStream
    batches: Batches
    seq_len: int

    @staticmethod
    def of(config: Config) -> "ScratchText":
        seq_len = settled(config.data.seq_len)
        stream = RandomTokens(resolve_model(config.model, Path.cwd()).vocab_size)
        per_update = rows_of(config.train.batch, seq_len)
        seed = config.train.seed
        batches = Batches(stream, seq_len=seq_len, rows_per_update=per_update, seed=seed)
        return ScratchText(stream, batches, seq_len)


class RandomTokens(TokenStream):
    """A stream of more tokens than anybody reads, each piece a function of its place."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens, self.documents = 2**40, 1
        self._vocab_size = vocab_size

    def read(self, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).integers(0, self._vocab_size, count)

    def read_rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        return np.stack([self.read(int(start), count) for start in starts])


def scratch_gradients(
    config: Config, model: Llama, optimizer: Optimizer, batch: Batch, count: int, lr: float
) -> tuple[Tensor, Tensor]:
    """What `gather` makes of these micro-batches, as training asks for it."""
    return gather(
        model,
        optimizer,
        MadeAnew(partial(on_device, batch, model.head_weight.device)),
        count=count,
        tokens=sum(targets.numel() for _, targets in batch),
        lr=lr,
        clip=config.train.clip if isinstance(config.train.clip, float) else None,
    )


def _save_largest(optimizer: Optimizer, folder: Path) -> None:
    """The largest weight and its states, by way of host memory, into a file that goes at once."""
    slot = max(optimizer.slots.values(), key=lambda slot: slot.weight.numel())
    states = {key: value for key, value in slot.state.items() if isinstance(value, Tensor)}
    tensors = [*_parts(slot.weight), *states.items()]
    copied = HostCopy().of(Snapshot(Position(), {}, {"trial": TensorFile(tensors)}))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trial-") as scratch:
        write_tensors(Path(scratch) / "trial.safetensors", copied.tensors["trial"].tensors, None)


def _parts(weight: Tensor | GroupedWeight) -> Iterator[tuple[str, Tensor]]:
    if isinstance(weight, Tensor):
        yield "weight", weight
    else:
        yield "weight.codes", weight.codes
        yield "weight.scales", weight.scales
        yield "weight.zeros", weight.zeros
