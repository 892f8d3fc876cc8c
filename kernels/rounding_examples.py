"""An example of `rounding.py`."""

import torch
from torch import Tensor

from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.rounding import ROUND, round_into


def _rounded(x: Tensor) -> Tensors:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_into(out, x.clone(), seed=7, offset=2**31 - 100)  # where the index wraps
    return (out,)


EXAMPLES = [
    Example(
        ROUND,
        lambda elements, device: (numbers(elements, 1, device),),
        _rounded,
        bytes=6,
    ),
]
