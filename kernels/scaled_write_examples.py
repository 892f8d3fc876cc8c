"""Examples of `scaled_write.py`."""

import torch
from torch import Tensor

from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import forced
from lowmem.kernels.example import Example, Tensors, matrix
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.groupwise_examples import GROUP, coded
from lowmem.kernels.rounding import round_into
from lowmem.kernels.scaled_write import WRITE, WRITE_CODES, Scaled
from lowmem.kernels.unproject_write import Product

_DESCENT = Descent(-0.125, 2.0**-10, True, seed=7, offset=2**31 - 100)  # where the index wraps


def write(weight: Weight, step: Scaled | Product) -> None:
    """By the kernel where it runs, else all rows at once."""
    if step.write(weight, _DESCENT):
        return
    exact = weight.float() if isinstance(weight, Tensor) else weight.values()
    _DESCENT.move(exact, step, 0, len(exact))
    if isinstance(weight, Tensor):
        round_into(weight, exact, _DESCENT.seed, _DESCENT.offset)
    else:
        weight.store(exact, (_DESCENT.seed, _DESCENT.offset))


def _floats(elements: int, device: torch.device) -> Tensors:
    full, weight = (matrix(elements, seed, device).bfloat16() for seed in (1, 2))
    return full, full.float().norm(dim=0, keepdim=True), weight


def _codes(elements: int, device: torch.device) -> Tensors:
    full, factors, weight = _floats(elements, device)
    with forced("reference"):
        return full, factors, *coded(weight.float().contiguous())


def _written(full: Tensor, factors: Tensor, weight: Tensor) -> Tensors:
    write(weight, Scaled(full, factors, 0.5))
    return (weight,)


def _written_codes(
    full: Tensor, factors: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor
) -> Tensors:
    write(GroupedWeight(codes, scales, zeros, GROUP), Scaled(full, factors, 0.5))
    return codes, scales, zeros


EXAMPLES = [
    Example(WRITE, _floats, _written, bytes=2 + 2 + 2),
    Example(WRITE_CODES, _codes, _written_codes, bytes=2 + 1 + 1 + 10 / 128),
]
