"""An example of `limited_scales.py`."""

import torch
from torch import Tensor

from lowmem.kernels.example import Example, Tensors, numbers
from lowmem.kernels.limited_scales import SCALES, limited_scales


def _norms(elements: int, device: torch.device) -> Tensors:
    over, under, norms = (numbers(elements, seed, device).abs() for seed in (1, 2, 3))
    return over, under, norms, norms.norm() / 3, torch.zeros((), device=device)


def _limited(over: Tensor, under: Tensor, norms: Tensor, last: Tensor, limited: Tensor) -> Tensors:
    scales = limited_scales(over.clone(), under.clone(), norms.clone(), last, limited, 1.01)
    return scales, last, limited


EXAMPLES = [
    Example(
        SCALES,
        _norms,
        _limited,
        bytes=4 * 4,
        tolerance=2e-6,  # sums in another order
    ),
]
