"""Write a step into a weight: decay, and stochastic rounding where the weight is not float32.

    write(weight, step, lr=0.01, ...)                    a float32 or bfloat16 tensor
    write(GroupedWeight.of(weight), step, lr=0.01, ...)  8-bit codes, without any other copy

The arithmetic is float32 in all of them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels.descent import Descent, Step, WritesItself
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.rounding import round_into
from lowmem.kernels.slices import BLOCK, row_slices


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
    width = weight.numel() // max(1, weight.shape[0])
    descent = Descent(-lr, lr * weight_decay, decay_first, seed, first_row * width)
    if isinstance(step, DependentStep):
        step.look(row_groups(weight))
    if isinstance(step, WritesItself) and step.write(weight, descent):
        return
    if isinstance(weight, GroupedWeight):
        _write_codes(weight, step, descent)
    else:
        _write_floats(weight, step, descent)


def _write_floats(weight: Tensor, step: Step, descent: Descent) -> None:
    # With decay, rows that have just been decayed are still in the cache.
    at_once = isinstance(step, OnePassStep) and not descent.decay and weight.dtype == torch.float32
    width = weight.numel() // max(1, weight.shape[0])
    for start, stop in row_slices(weight, elements=weight.numel() if at_once else None):
        target = weight[start:stop]
        exact = target if target.dtype == torch.float32 else target.float()
        descent.move(exact, step, start, stop)
        if exact is not target:
            round_into(target, exact, descent.seed, descent.offset + start * width)


def _write_codes(weight: GroupedWeight, step: Step, descent: Descent) -> None:
    """Row group by row group: whole blocks of the moments and whole groups of the codes."""
    width = weight.numel() // max(1, weight.shape[0])
    for start, stop in row_bounds(weight):
        rows = weight.rows(start, stop)
        exact = descent.move(rows.values(), step, start, stop)
        rows.store(exact, (descent.seed, descent.offset + start * width))
