"""Examples of `scaled_matmul.py`: in fp8 too, where the card multiplies in it."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lowmem.kernels import scaled_matmul
from lowmem.kernels.example import Example, Tensors, matrix, numbers
from lowmem.kernels.scaled_matmul import Codes, EightBit


def _two(elements: int, device: torch.device) -> Tensors:
    """Square bfloat16 matrices of about so many elements together."""
    side = max(1, math.isqrt(elements // 2))
    first, second = (numbers(side * side, seed, device).view(side, side) for seed in (1, 2))
    return first.bfloat16(), second.bfloat16()


def _kinds(x: Tensor) -> Sequence[EightBit]:
    return ("int8", "fp8") if x.is_cuda and scaled_matmul.multiplies_fp8() else ("int8",)


def _quantized(make: Callable[[Tensor, EightBit], Codes], x: Tensor) -> Tensors:
    made = [each for kind in _kinds(x) for each in make(x, kind)]
    return tuple(each if each.dtype == torch.float32 else each.view(torch.int8) for each in made)


def _multiplied(x: Tensor, weight: Tensor) -> Tensors:
    return tuple(scaled_matmul.linear(x, weight, kind, x) for kind in _kinds(x))


EXAMPLES = [
    *(
        Example(
            kernel,
            lambda elements, device: (matrix(elements, 1, device).bfloat16(),),
            partial(_quantized, make),
            bytes=3,
        )
        for kernel, make in (
            (scaled_matmul.ROW_CODES, scaled_matmul.row_codes),
            (scaled_matmul.COLUMN_CODES, scaled_matmul.column_codes),
        )
    ),
    Example(
        scaled_matmul.PRODUCT,
        _two,
        _multiplied,
        bytes=4,  # but products take longer
        tolerance=2**-8,  # of fp8: sums in another order
    ),
]
