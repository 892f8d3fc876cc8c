"""An example of `adam8.py`."""

import torch
from torch import Tensor

from lowmem.kernels.adam8 import ADAM8, Moment8, add_adam8_direction
from lowmem.kernels.blockwise import quantize
from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Example, Tensors, numbers


def _moments(elements: int, device: torch.device) -> Tensors:
    gradient, m = (numbers(elements, seed, device) for seed in (1, 2))
    with forced("reference"):
        first = quantize(m, signed=True)
        second = quantize(m.square(), signed=False, floor_codes=True)
    return (torch.zeros_like(gradient), gradient, *first, *second)


def _moved(target: Tensor, gradient: Tensor, *moments: Tensor) -> Tensors:
    add_adam8_direction(
        target,
        gradient,
        Moment8(*moments[:2]),
        Moment8(*moments[2:]),
        alpha=-0.1,
        scale=1.3,
        betas=(0.9, 0.999),
        eps=1e-8,
        floor_codes=True,
    )
    return (target, *moments)


EXAMPLES = [
    Example(
        ADAM8,
        _moments,
        _moved,
        bytes=12 + 4 + 4 / 64,
        tolerance=3e-7,  # of the step: oneMKL's sqrt may miss the last bit
    ),
]
