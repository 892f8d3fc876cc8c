"""Write a step into a weight: decay, and stochastic rounding where the weight is not float32.

    write(weight, step, lr=0.01, ...)                    a float32 or bfloat16 tensor
    write(GroupedWeight.of(weight), step, lr=0.01, ...)  8-bit codes, without any other copy

The arithmetic is float32 in all of them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.rounding import round_into
from lowmem.kernels.slices import BLOCK, row_slices

Step = Callable[[Tensor, int, int, float], None]
"""step(rows, start, stop, alpha): add alpha * direction[start:stop] to these float32 rows of the
weight. Called once for every group of rows, from the first to the last; start * row length is a
multiple of 256. The whole direction need never be in memory."""


@runtime_checkable
class WritesItself(Protocol):
    """What else a Step may have: a kernel that does all of `write` for some weights."""

    def write(
        self,
        weight: Weight,
        *,
        alpha: float,
        decay: float,
        decay_first: bool,
        seed: int,
        offset: int,
    ) -> bool:
        """weight <- weight + alpha * direction, less `decay` of itself, with the noise of (seed,
        offset + element). False, and nothing is done, where no kernel does that: its rows are
        asked for."""


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Some rows in the same memory; `aligned` ones."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def aligned(weight: Weight, start: int) -> bool:
    """Does that row begin a block of 256 elements and a group of the codes?"""
    unit = BLOCK if isinstance(weight, Tensor) else math.lcm(BLOCK, weight.group)
    return start * (weight.numel() // max(1, weight.shape[0])) % unit == 0


def row_bounds(weight: Weight) -> Iterator[tuple[int, int]]:
    """(start, stop) of the groups of rows in which a weight is written, from first to last."""
    if isinstance(weight, Tensor):
        return row_slices(weight)
    return row_slices(weight.codes, math.lcm(BLOCK, weight.group))


def like(weight: Weight) -> Tensor:
    """A tensor with the weight's shape and device and its gradients' dtype; its values are void."""
    if isinstance(weight, Tensor):
        return weight
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)


RowGroups = Iterator[tuple[Tensor, int, int]]
"""(rows, start, stop) from the first rows to the last: float32, not to be changed."""


@dataclass(frozen=True)
class DependentStep:
    """A Step that depends on the weight itself, before decay: `look` sees all of it first."""

    look: Callable[[RowGroups], None]
    step: Step

    def __call__(self, rows: Tensor, start: int, stop: int, alpha: float) -> None:
        self.step(rows, start, stop, alpha)


@dataclass(frozen=True)
class OnePassStep:
    """A Step that takes no memory of its own: float32 rows need not come in groups."""

    step: Step

    def __call__(self, rows: Tensor, start: int, stop: int, alpha: float) -> None:
        self.step(rows, start, stop, alpha)


def row_groups(weight: Weight) -> RowGroups:
    """The weight's values, in the groups in which it is written."""
    for start, stop in row_bounds(weight):
        rows = rows_of(weight, start, stop)
        yield rows.float() if isinstance(rows, Tensor) else rows.values(), start, stop


def write(
    weight: Weight,
    step: Step,
    *,
    lr: float,
    weight_decay: float,
    decay_first: bool,
    seed: int,
    first_row: int = 0,
) -> None:
    """weight <- weight - lr * direction, with decoupled decay before or after; in place.

    seed: of this weight's rounding in this update. first_row: where `weight` is but some rows of
    one, the number of the first; noise belongs to elements of the whole. The arithmetic is float32
    whatever the weight's format; no full-size temporary appears.
    """
    decay = lr * weight_decay
    if isinstance(step, DependentStep):
        step.look(row_groups(weight))
    if isinstance(step, WritesItself):
        offset = first_row * (weight.numel() // max(1, weight.shape[0]))
        if step.write(
            weight, alpha=-lr, decay=decay, decay_first=decay_first, seed=seed, offset=offset
        ):
            return

    def moved(exact: Tensor, start: int, stop: int) -> Tensor:
        # Not times 1 - decay: in float32 that rounds away the digits of a small decay.
        if decay_first and decay:
            exact.add_(exact, alpha=-decay)
        step(exact, start, stop, -lr)
        if not decay_first and decay:
            exact.add_(exact, alpha=-decay)
        return exact

    if isinstance(weight, GroupedWeight):
        _write_codes(weight, moved, seed, first_row)
    else:
        # With decay, rows that have just been decayed are still in the cache.
        at_once = isinstance(step, OnePassStep) and not decay and weight.dtype == torch.float32
        _write_floats(weight, moved, seed, first_row, weight.numel() if at_once else None)


Moved = Callable[[Tensor, int, int], Tensor]


def _write_floats(
    weight: Tensor, moved: Moved, seed: int, first_row: int, elements: int | None
) -> None:
    """elements: of a group of rows, if not as many as suit the device."""
    width = weight.numel() // max(1, weight.shape[0])
    for start, stop in row_slices(weight, elements=elements):
        target = weight[start:stop]
        exact = target if target.dtype == torch.float32 else target.float()
        moved(exact, start, stop)
        if exact is not target:
            round_into(target, exact, seed, (first_row + start) * width)


def _write_codes(weight: GroupedWeight, moved: Moved, seed: int, first_row: int) -> None:
    """Row group by row group: whole blocks of the moments and whole groups of the codes."""
    width = weight.numel() // max(1, weight.shape[0])
    for start, stop in row_bounds(weight):
        rows = weight.rows(start, stop)
        exact = moved(rows.values(), start, stop)
        at = (first_row + start) * width
        rows.store(exact, (seed, at))
