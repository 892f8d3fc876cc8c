"""Examples of `rms_norm.py`."""

import torch
from torch import Tensor

from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Example, Tensors, token_rows
from lowmem.kernels.rms_norm import (
    AGAIN,
    BACKWARD,
    NORM,
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
)

_EPS = 1e-6


def _rows(elements: int, device: torch.device) -> Tensors:
    """x and weight, and with them the rstd that the forward keeps."""
    x, other = token_rows(elements, device, 2)
    with forced("reference"):
        return x, other[0].clone(), rms_norm(x, other[0], _EPS)[1]


def _rows_and_gradient(elements: int, device: torch.device) -> Tensors:
    return *_rows(elements, device), token_rows(elements, device, 3)[2]


def _gradients(x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> Tensors:
    made = grad.clone()
    return rms_norm_backward(made, x, weight, rstd), made


EXAMPLES = [
    Example(
        NORM,
        _rows,
        lambda x, weight, _: rms_norm(x, weight, _EPS),
        bytes=4,
        tolerance=3e-7,
        neighbours=2,
    ),
    Example(
        AGAIN,
        _rows,
        lambda x, weight, rstd: (rms_norm_again(x, weight, rstd),),
        bytes=4,
    ),
    Example(
        BACKWARD,
        _rows_and_gradient,
        _gradients,
        bytes=6,
        tolerance=3e-7,
        neighbours=2,
    ),
]
