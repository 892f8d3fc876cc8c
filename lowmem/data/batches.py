"""Which tokens come at which update, for which rank: computed, never stored.

Row r of update u is number k = u * rows_per_update + r of an endless sequence. Epoch k // windows
has a permutation of its own, and the row is the window at place k % windows of it. So the position
is the update index alone, and micro-batch and number of ranks change nothing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowmem.data.shards import TokenStream
from lowmem.errors import DataError
from lowmem.naming import seed_of

IGNORED = -100
"""The target that cross entropy leaves out."""

_ROUNDS = 6
_AT_ONCE = 2**13  # rows whose windows are computed together: a permutation costs by the call


@dataclass(frozen=True)
class UpdateBatch:
    """All rows of one update for this rank.

    rows: (rows, seq_len + 1) int64 on the CPU. tokens: targets of the update over all ranks.
    lengths: tokens of each row that are no padding, (rows,) int64; None: there is no padding.
    by_length: rows go to micro-batches by their length, the longest last: then sums are held, too,
    and an update needs what was planned.
    """

    rows: Tensor
    tokens: int
    lengths: Tensor | None = None
    by_length: bool = False

    def micro_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets), each (b, t) and contiguous; b = size, the last may be less.

        t is seq_len, or the length of the longest row where rows are padded; targets that are
        padding are IGNORED.
        """
        if self.lengths is None:
            for part in self.rows.split(size):
                yield part[:, :-1].contiguous(), part[:, 1:].contiguous()
            return
        rows, lengths = self.rows.numpy(), self.lengths.numpy()
        order = np.argsort(lengths, kind="stable") if self.by_length else np.arange(len(rows))
        columns = np.arange(1, rows.shape[1])
        for start in range(0, len(rows), size):
            own = order[start : start + size]
            longest = int(lengths[own].max())
            part = rows[own, : longest + 1]  # no more columns than some row needs
            inputs, targets = part[:, :-1].copy(), part[:, 1:].copy()
            targets[columns[:longest] >= lengths[own, None]] = IGNORED
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    def digest(self) -> str:
        """sha256 of the tokens, to prove that a resumed run continues with the same batch."""
        return hashlib.sha256(self.rows.numpy().astype("<i8").tobytes()).hexdigest()


def on_device(
    micro_batches: list[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """One micro-batch at a time; copied on the CPU too, so that it is counted like elsewhere."""
    for inputs, targets in micro_batches:
        yield inputs.to(device, copy=True), targets.to(device, copy=True)


class TrainingOrder(Protocol):
    """Update index -> rows: of packed text (`Batches`), or of documents (`documents.py`)."""

    def of(self, update: int) -> UpdateBatch: ...
    def places_of(self, update: int) -> list[tuple[str, int]]: ...


class Batches:
    """The order of training: update index -> rows of packed text."""

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        rows_per_update: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """rows_per_update: over all ranks, a multiple of `ranks`; each takes consecutive rows."""
        if rows_per_update < 1 or rows_per_update % ranks or not 0 <= rank < ranks:
            raise ValueError(f"{rows_per_update} rows for rank {rank} of {ranks}")
        self.windows = (stream.tokens - 1) // seq_len
        if self.windows < 1:
            raise DataError(
                f"the training part has {stream.tokens} tokens, one sequence needs {seq_len + 1}",
                "",
                f"give more text, or --seq-len {max(1, stream.tokens - 1)} or less",
            )
        self._stream, self._seq_len, self._seed = stream, seq_len, seed
        self._rows_per_update = rows_per_update
        share = rows_per_update // ranks
        self._own = np.arange(rank * share, (rank + 1) * share)
        self._together = max(1, min(_AT_ONCE, self.windows) // share)  # updates
        self._first = -1  # of those whose windows are known

    def of(self, update: int) -> UpdateBatch:
        """The rows of update `update` (from 0)."""
        starts = self._windows_of(update) * self._seq_len
        rows = self._stream.read_rows(starts, self._seq_len + 1)
        return UpdateBatch(torch.from_numpy(rows), self._rows_per_update * self._seq_len)

    def places_of(self, update: int) -> list[tuple[str, int]]:
        """(shard, first token in it) of every row of update `update`."""
        return [
            self._stream.place(int(window) * self._seq_len) for window in self._windows_of(update)
        ]

    def _windows_of(self, update: int) -> np.ndarray:
        """(rows,) int64."""
        first = update - update % self._together
        if first != self._first:
            updates = np.arange(first, first + self._together)
            self._known = self._windows_at(updates[:, None] * self._rows_per_update + self._own)
            self._first = first
        chosen: np.ndarray = self._known[update - first]
        return chosen

    def _windows_at(self, rows: np.ndarray) -> np.ndarray:
        """Of rows of the endless sequence, in the shape of `rows`."""
        epochs, places = np.divmod(rows, self.windows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            key = seed_of(self._seed, "data order", int(epoch))
            chosen[now] = permute(places[now], self.windows, key)
        return chosen


def permute(places: np.ndarray, count: int, key: int) -> np.ndarray:
    """Where a permutation of range(count), chosen by `key`, sends each of `places`.

    A Feistel network permutes the next 4^b >= count numbers; what lands outside walks on along
    its cycle until it lands inside, which takes fewer than four steps on average.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 3-4.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    keys = [np.uint64(seed_of(key, "round", number)) for number in range(_ROUNDS)]
    moved = _feistel(places.astype(np.uint64), half, keys)
    outside = moved >= count
    while outside.any():
        moved[outside] = _feistel(moved[outside], half, keys)
        outside = moved >= count
    return moved.astype(np.int64)


def _feistel(numbers: np.ndarray, half: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit depends on every bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def validation_batches(
    stream: TokenStream, seq_len: int, rows: int, max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), (b, seq_len) int64 each, in order, b <= rows; every target comes once.

    max_tokens: number of targets, None for all. The last window is filled up with input 0 and
    target -100 where it is shorter.
    """
    targets = stream.tokens - 1
    if targets < 1:
        raise DataError(f"the validation part has {stream.tokens} token", "", "give more text")
    targets = targets if max_tokens is None else min(targets, max_tokens)
    for start in range(0, targets, rows * seq_len):
        count = min(rows * seq_len, targets - start)
        lines = -(-count // seq_len)
        tokens = stream.read(start, count + 1)
        inputs = np.zeros(lines * seq_len, np.int64)
        wanted = np.full(lines * seq_len, IGNORED, np.int64)
        inputs[:count], wanted[:count] = tokens[:-1], tokens[1:]
        yield (
            torch.from_numpy(inputs.reshape(lines, seq_len)),
            torch.from_numpy(wanted.reshape(lines, seq_len)),
        )
