"""Products with a weight that is 8-bit codes: x W' of a linear layer, and its input gradient.

Two ways, whose weights have the very values that `group_dequantize` gives in the dtype of x, and
whose sums differ in their order alone:

    from codes    a kernel makes floats of a tile at a time, in registers: no copy of the weight
    by slices     a slice of rows at a time is made floats for the library's product: the reference

Few tokens take the first way, where the kernel runs: see `few_tokens.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.few_tokens import reads_codes
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.slices import divided, row_slices

LINEAR = Kernel(
    "int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? added, "
    "Tensor(a!) out, int group) -> ()",
    triton="int8_linear_triton",
)
INPUT_GRADIENT = Kernel(
    "int8_input_gradient(Tensor grad, Tensor codes, Tensor scales, Tensor zeros, Tensor(a!) out, "
    "int group, bool accumulate) -> ()",
    triton="int8_linear_triton",
)

SLICE_ELEMENTS = 2**24  # of full precision at a time: 32 MiB in bf16


def linear(x: Tensor, weight: GroupedWeight, added: Tensor | None = None) -> Tensor:
    """added + x W': (n, inputs) -> (n, outputs), new. added: (outputs) or (n, outputs)."""
    way = linear_from_codes if _few(x) else linear_by_slices
    return way(x, weight, added)


def input_gradient(grad: Tensor, weight: GroupedWeight, total: Tensor | None = None) -> Tensor:
    """grad W: (n, outputs) -> (n, inputs), new, or added to `total` in place."""
    way = input_gradient_from_codes if _few(grad) else input_gradient_by_slices
    return way(grad, weight, total)


def _few(x: Tensor) -> bool:
    return reads_codes(len(x)) and LINEAR.runs_on(x)


def linear_from_codes(x: Tensor, weight: GroupedWeight, added: Tensor | None) -> Tensor:
    """`linear` by the kernel."""
    out = x.new_empty(len(x), len(weight.codes))
    LINEAR(x.contiguous(), *_stored(weight), added, out, weight.group)
    return out


def input_gradient_from_codes(grad: Tensor, weight: GroupedWeight, total: Tensor | None) -> Tensor:
    """`input_gradient` by the kernel."""
    out = grad.new_empty(len(grad), weight.shape[1]) if total is None else total
    INPUT_GRADIENT(grad.contiguous(), *_stored(weight), out, weight.group, total is not None)
    return out


def _stored(weight: GroupedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.scales, weight.zeros


def linear_by_slices(x: Tensor, weight: GroupedWeight, added: Tensor | None) -> Tensor:
    """`linear`, a slice of columns at a time, each written in place."""
    out = x.new_empty(len(x), len(weight.codes))
    for start, stop in _slices(weight):
        columns, rows = out[:, start:stop], _rows(weight, start, stop, x)
        if added is None:
            torch.mm(x, rows.t(), out=columns)
        else:
            torch.addmm(added[..., start:stop], x, rows.t(), out=columns)
        del rows  # before the next are made
    return out


def input_gradient_by_slices(grad: Tensor, weight: GroupedWeight, total: Tensor | None) -> Tensor:
    """`input_gradient`, the sum of what slices of rows contribute."""
    out = total
    for start, stop in _slices(weight):
        rows = _rows(weight, start, stop, grad)
        if out is None:
            out = grad[:, start:stop] @ rows
        else:
            out.addmm_(grad[:, start:stop], rows)
        del rows  # before the next are made
    assert out is not None
    return out


def _slices(weight: GroupedWeight) -> Iterator[tuple[int, int]]:
    return row_slices(weight.codes, weight.group, divided(SLICE_ELEMENTS))


def _rows(weight: GroupedWeight, start: int, stop: int, like: Tensor) -> Tensor:
    return weight.rows(start, stop).values(like.dtype)
