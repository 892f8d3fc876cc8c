"""An example of `rope.py`."""

import torch

from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.rope import ROTATE, frequencies, rotate_, tables


def _heads(elements: int, device: torch.device) -> Tensors:
    """Two sequences of heads of up to 64 features, and the angles of their positions."""
    half = min(max(1, elements // 12), 32)
    length = max(1, elements // (12 * half))
    x = numbers(12 * length * half, 1, device).view(2, length, 3, 2 * half).bfloat16()
    return x, *tables(frequencies(2 * half, 10000.0, device), length)


EXAMPLES = [
    Example(
        ROTATE,
        _heads,
        lambda x, cos, sin: (rotate_(x.clone(), cos, sin),),
        bytes=4,
        tolerance=3e-7,
        neighbours=2,
    ),
]
