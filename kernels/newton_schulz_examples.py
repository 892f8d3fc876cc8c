"""An example of `newton_schulz.py`."""

import math

import torch
from torch import Tensor

from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.newton_schulz import SYMMETRIC, symmetric_product


def _wide(elements: int, device: torch.device) -> Tensors:
    """A bfloat16 matrix about twice as wide as high, and a symmetric one; a sixteenth of the
    elements, for every one of them is multiplied by a whole row."""
    side = max(1, math.isqrt(elements // 32))
    width = max(1, elements // (16 * side))
    x = numbers(side * width, 1, device).bfloat16().view(side, width)
    added = numbers(side * side, 2, device).bfloat16().view(side, side)
    return x, added + added.T


def _products(x: Tensor, added: Tensor) -> Tensors:
    return symmetric_product(x, added, alpha=0.5, beta=-2.0), symmetric_product(x, turned=True)


EXAMPLES = [
    Example(
        SYMMETRIC,
        _wide,
        _products,
        bytes=(2 * (1 + 0.5 + 0.5) + 2 * (1 + 2)) / 16,  # but products take longer
        tolerance=2**-8,  # sums in float32 in another order may round the other way
    ),
]
