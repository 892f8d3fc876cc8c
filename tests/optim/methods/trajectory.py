"""A weight, some gradients and what a method makes of them; shared by the tests of methods."""

import torch
from torch import Tensor

from lowmem.optim.method import Method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (20, 7),
    "wide": (7, 20),
    "square": (9, 9),
    "row": (1, 12),
}
LR, DECAY = 0.01, 0.1


def gradients(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def optimizer_of(
    method: Method,
    weight: Tensor,
    place: Place = Place(),  # noqa: B008 - frozen
    decay: float = DECAY,
) -> Optimizer:
    """An optimizer of one weight, called "weight"."""
    optimizer = Optimizer("unfused", seed=0)
    optimizer.add("weight", weight, method, decay, place)
    return optimizer


def step(optimizer: Optimizer, grad: Tensor, lr: float = LR) -> None:
    optimizer.begin(lr, 1)
    optimizer.receive("weight", grad.clone())
    optimizer.step()


def run(
    method: Method,
    start: Tensor,
    grads: list[Tensor],
    place: Place = Place(),  # noqa: B008 - frozen
    decay: float = DECAY,
) -> Tensor:
    """The weight after all gradients, at a constant learning rate."""
    weight = start.clone()
    optimizer = optimizer_of(method, weight, place, decay)
    for grad in grads:
        step(optimizer, grad)
    return weight
