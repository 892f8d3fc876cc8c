"""When the subspace is chosen anew, as a function of the number of updates done."""

from dataclasses import dataclass
from typing import Protocol


class Refresh(Protocol):
    def due(self, step: int) -> bool:
        """Before update number `step` (from 0): is it time?"""


@dataclass(frozen=True)
class Every:
    """At updates 0, gap, 2 gap, ..."""

    gap: int

    def due(self, step: int) -> bool:
        return step % self.gap == 0
