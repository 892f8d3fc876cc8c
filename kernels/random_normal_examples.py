"""An example of `random_normal.py`."""

import torch

from lowmem.kernels.example import Example
from lowmem.kernels.random_normal import NORMAL, normal

EXAMPLES = [
    Example(
        NORMAL,
        lambda elements, device: (torch.empty(elements, device=device),),
        lambda like: (normal(like.numel(), 11, offset=2**32 - 200, device=like.device),),
        bytes=4,
    ),
]
