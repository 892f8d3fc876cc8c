"""What methods say of themselves: who updates what at the start, and their figures on the way."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowmem.optim.composition import expression
from lowmem.optim.optimizer import Optimizer
from lowmem.train.events import Assigned, Diagnosed, Group

SUMMED = ("kept_bases",)  # the others are averaged
EVERY = 50  # updates, and with every evaluation: reading the figures waits for the device


def assigned(optimizer: Optimizer, roles: Mapping[str, str]) -> Assigned:
    """Weights by the method that they have, in the order of the model."""
    groups: dict[str, list[str]] = {}
    for name, slot in optimizer.slots.items():
        groups.setdefault(expression(slot.method), []).append(name)
    return Assigned(
        [
            Group(
                ", ".join(dict.fromkeys(roles[name].partition(".")[0] for name in names)),
                len(names),
                sum(optimizer.slots[name].weight.numel() for name in names),
                method,
            )
            for method, names in groups.items()
        ]
    )


def diagnosed(update: int, optimizer: Optimizer) -> Diagnosed | None:
    """The figures after `update` (0-based); None where no method notes any."""
    figures = figures_of(optimizer)
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return Diagnosed(update, finite) if figures else None


def figures_of(optimizer: Optimizer) -> dict[str, float]:
    """What methods note of themselves, over all weights. Waits for the device."""
    found: dict[str, list[Tensor]] = {}
    for key, value in optimizer.state_tensors():
        _, logged, what = key.rpartition("/log.")
        if logged:
            found.setdefault(what, []).append(value)
    together = {what: torch.stack(values) for what, values in found.items()}
    figures = [v.sum() if what in SUMMED else v.mean() for what, v in together.items()]
    return dict(zip(together, torch.stack(figures).tolist(), strict=True)) if figures else {}
