"""Examples of `int8_linear.py`."""

import math
from functools import partial

import torch
from torch import Tensor

from lowmem.kernels import int8_linear
from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.groupwise_examples import GROUP, codes

_TOKENS = 64  # of which a card reads a weight at the speed of its memory


def _factors(elements: int, device: torch.device, *, turned: bool) -> Tensors:
    """Codes of a weight about square, bfloat16 to multiply it by, and something to add."""
    width = math.isqrt(elements)
    width = max(width // GROUP * GROUP, min(width, GROUP))  # where it can, of whole groups
    rows = elements // width
    inner, outer = (width, rows) if turned else (rows, width)
    x, added = (
        numbers(_TOKENS * size, seed, device).bfloat16().view(_TOKENS, size)
        for size, seed in ((inner, 2), (outer, 3))
    )
    weight, scales, zeros = codes(rows * width, device)
    return x, weight.view(rows, width), scales, zeros, added


def _linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, added: Tensor) -> Tensors:
    return (int8_linear.linear(x, GroupedWeight(codes, scales, zeros, GROUP), added),)


def _input_gradient(
    grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, added: Tensor
) -> Tensors:
    weight = GroupedWeight(codes, scales, zeros, GROUP)
    return (int8_linear.input_gradient(grad, weight, added.clone()),)


EXAMPLES = [
    Example(
        kernel,
        partial(_factors, turned=kernel is int8_linear.LINEAR),
        run,
        bytes=1 + 5 / 128,
        tolerance=2**-8,  # sums in float32 in another order may round the other way
    )
    for kernel, run in (
        (int8_linear.LINEAR, _linear),
        (int8_linear.INPUT_GRADIENT, _input_gradient),
    )
]
