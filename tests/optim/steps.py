"""A step as a tensor: what a method would subtract at learning rate 1."""

import torch
from torch import Tensor

from lowmem.optim.weights import Step


def full(step: Step | None, shape: tuple[int, ...]) -> Tensor:
    """The whole direction, float32; zeros where the method pauses."""
    return part(step, shape, 0, shape[0])


def part(step: Step | None, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Rows start to stop of the direction."""
    rows = torch.zeros(stop - start, *shape[1:])
    if step is not None:
        step(rows, start, stop, 1.0)
    return rows
