"""Examples of `blockwise.py`."""

import torch

from lowmem.kernels.blockwise import DEQUANTIZE, QUANTIZE, dequantize, quantize
from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Example, Tensors, numbers


def _codes(elements: int, device: torch.device) -> Tensors:
    with forced("reference"):
        return quantize(numbers(elements, 1, device), signed=True)


EXAMPLES = [
    Example(
        QUANTIZE,
        lambda elements, device: (numbers(elements, 1, device),),
        lambda x: quantize(x, signed=True),
        bytes=5 + 1 / 64,
    ),
    Example(
        DEQUANTIZE,
        _codes,
        lambda codes, absmax: (dequantize(codes, absmax, signed=True),),
        bytes=5 + 1 / 64,
    ),
]
