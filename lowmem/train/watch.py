"""While a run lasts: does anybody use more of the card than the plan allows for?

Every EVERY updates the device is asked once. Other programs may grow by the plan's margin; what we
reserve may exceed the plan by what a plan is allowed to be wrong. Each is told once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from lowmem.planner.calibration import ALLOWED_UNDER
from lowmem.planner.plan import Plan
from lowmem.train.cap import Cap
from lowmem.train.events import Grown

EVERY = 50


@dataclass(frozen=True)
class DeviceReading:
    """Bytes of the card, and what our allocator has of them."""

    total: int
    free: int
    reserved: int


def read_device() -> DeviceReading:
    """Of the current CUDA device."""
    free, total = torch.cuda.mem_get_info()
    return DeviceReading(total, free, torch.cuda.memory_reserved())


@dataclass
class Watch:
    """plan: None where none is known, and nothing is watched then. read: asks the device.

    cap: its ballast is no growth of ours.
    """

    plan: Plan | None
    read: Callable[[], DeviceReading]
    cap: Cap = field(default_factory=Cap)
    _told: set[str] = field(default_factory=set)

    @staticmethod
    def over(plan: Plan | None, device: str, cap: Cap) -> "Watch":
        """Of a run on `device`; the host's memory belongs to everybody, so it is not watched."""
        return Watch(plan if device == "cuda" else None, read_device, cap)

    def after(self, update: int) -> Iterator[Grown]:
        """What has grown and has not been told, after update `update` (0-based)."""
        if self.plan is None or (update + 1) % EVERY:
            return
        card, now = self.plan.card, self.read()
        others = now.total - now.free - now.reserved - card.context
        if others > card.others + card.margin:
            yield from self._once(Grown(update, "others", card.others, others))
        ours = now.reserved - self.cap.held_back
        if ours > (1 + ALLOWED_UNDER) * self.plan.memory.reserved:
            yield from self._once(Grown(update, "ours", self.plan.memory.reserved, ours))

    def _once(self, grown: Grown) -> Iterator[Grown]:
        if grown.whose not in self._told:
            self._told.add(grown.whose)
            yield grown
