"""The budget as a promise: on CUDA this process gets what its plan may reserve, and no more.

A leak or a mistake in a plan then fails here, and not in the desktop beside it. Part of the card's
margin is held back as ballast, the first thing that an out-of-memory error lets go of.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.planner.plan import Plan
from lowmem.units import MIB

BALLAST = 64 * MIB


@dataclass
class Cap:
    """bytes: what our allocator may reserve, the ballast included; None: there is no cap."""

    bytes: int | None = None
    ballast: Tensor | None = None

    @property
    def held_back(self) -> int:
        """Bytes of the ballast, while it is there."""
        return 0 if self.ballast is None else self.ballast.numel()

    def take_ballast(self) -> None:
        """Hold back what `bytes` has room for beside the plan; nothing where there is no room."""
        if self.bytes is not None:
            with suppress(torch.OutOfMemoryError):
                self.ballast = torch.empty(BALLAST, dtype=torch.uint8, device="cuda")


@contextmanager
def capped(plan: Plan | None, device: str, ballast: int = 0) -> Iterator[Cap]:
    """Cap this process at the plan's budget; on the CPU, or without a plan, at nothing.

    ballast: bytes beyond the budget, of the margin of the plan's card, that `take_ballast` takes.
    """
    if plan is None or device != "cuda":
        yield Cap()
        return
    total = torch.cuda.get_device_properties().total_memory
    limit = min(total, plan.card.usable_bytes + ballast)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        yield Cap(limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
