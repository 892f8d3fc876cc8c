"""Examples of `unproject_write.py`."""

import torch
from torch import Tensor

from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.groupwise_examples import GROUP, coded
from lowmem.kernels.rounding import hashed_bits
from lowmem.kernels.scaled_write import Scaled
from lowmem.kernels.scaled_write_examples import write
from lowmem.kernels.unproject_write import WRITE, WRITE_CODES, Product

_RANK, _WIDEST = 64, 4096


def _factors(rows: int, columns: int, device: torch.device) -> Tensors:
    """Of -1, 0 and 1: in whatever order their products are added, the sum is exact."""
    drawn = hashed_bits((rows + columns) * _RANK, 5, 0, device).remainder(3).sub(1).bfloat16()
    first, second = drawn[: rows * _RANK], drawn[rows * _RANK :]
    return first.view(rows, _RANK), second.view(_RANK, columns)


def _floats(elements: int, device: torch.device) -> Tensors:
    columns = min(elements, _WIDEST)
    rows = elements // columns
    weight, rest = (
        numbers(rows * columns, seed, device).view(rows, columns).bfloat16() for seed in (1, 2)
    )
    scales = hashed_bits(columns, 3, 0, device).remainder(4).neg().float().exp2()
    return (weight, *_factors(rows, columns, device), rest, scales.view(1, columns))


def _written(
    weight: Tensor, first: Tensor, second: Tensor, rest: Tensor, scales: Tensor
) -> Tensors:
    write(weight, Product(first, second, Scaled(rest, scales, 0.5)))
    return (weight,)


def _codes(elements: int, device: torch.device) -> Tensors:
    columns = min(-(-elements // GROUP) * GROUP, _WIDEST)
    rows = -(-elements // columns)
    with forced("reference"):
        stored = coded(numbers(rows * columns, 1, device).view(rows, columns))
    return (*stored, *_factors(rows, columns, device))


def _written_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor, first: Tensor, second: Tensor
) -> Tensors:
    write(GroupedWeight(codes, scales, zeros, GROUP), Product(first, second))
    return codes, scales, zeros


EXAMPLES = [
    Example(WRITE, _floats, _written, bytes=6),
    Example(WRITE_CODES, _codes, _written_codes, bytes=2 + 10 / 128),
]
