"""Examples of `groupwise.py`, and the codes that other operators' examples begin with."""

import torch
from torch import Tensor

from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.groupwise import (
    DEQUANTIZE,
    QUANTIZE,
    Groups,
    dequantize,
    group_count,
    quantize_into,
)

GROUP = 128


def coded(x: Tensor) -> Groups:
    """Codes of x, float32, where the index of the noise wraps."""
    count = group_count(x.numel(), GROUP)
    into = Groups(
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        torch.empty(count, device=x.device),
        torch.empty(count, dtype=torch.uint8, device=x.device),
    )
    quantize_into(into, x, 8, GROUP, at=(7, 2**31 - 100))
    return into


def codes(elements: int, device: torch.device) -> Groups:
    """The reference's, of `numbers`."""
    with forced("reference"):
        return coded(numbers(elements, 1, device))


def _values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensors:
    return (dequantize(codes, scales, zeros, GROUP, torch.bfloat16),)


EXAMPLES = [
    Example(
        QUANTIZE,
        lambda elements, device: (numbers(elements, 1, device),),
        coded,
        bytes=5 + 5 / 128,
    ),
    Example(DEQUANTIZE, codes, _values, bytes=3 + 5 / 128),
]
