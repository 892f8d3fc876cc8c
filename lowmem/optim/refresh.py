"""When the subspace is chosen anew, as a function of the number of updates done."""

from dataclasses import dataclass
from typing import Protocol

import torch

from lowmem.optim.formats import State, number, tensor
from lowmem.optim.place import Place


class Refresh(Protocol):
    def init(self, state: State, place: Place) -> None:
        """Note what `due` will need."""

    def due(self, state: State) -> bool:
        """Before update number state["step"] (from 0): is it time?"""

    def refreshed(self, state: State) -> None:
        """The subspace has just been chosen."""


@dataclass(frozen=True)
class Every:
    """At update 0, and then every `gap` updates.

    staggered: matrix i of n has its turns at i/n of a gap after the first one's, so that no update
    pays for all; otherwise all have theirs at updates 0, gap, 2 gap, ..., as published.
    """

    gap: int
    staggered: bool = True

    def init(self, state: State, place: Place) -> None:
        state["refresh_offset"] = place.index * self.gap // place.count if self.staggered else 0

    def due(self, state: State) -> bool:
        step = number(state, "step")
        return step == 0 or step % self.gap == number(state, "refresh_offset")

    def refreshed(self, state: State) -> None:
        """Nothing changes."""


@dataclass(frozen=True)
class Lazy:
    """As `Every`, but the gap grows while the subspace hardly changes.

    After each refresh  queue <- the last `queue` similarities of new and old basis
        queue full and its mean >= threshold:  gap <- int(gap * growth), queue <- empty
    and the next refresh is at the next multiple of the new gap, plus the offset.

    The gap stays below limit * gap. As published: clear = false, staggered = false and no limit.
    A refresh that comes before a whole gap has passed, which staggering causes once, is not asked.

    The projector leaves the similarity in state["log.similarity"]. The host reads it, and so waits
    for the device, only at refreshes that find the queue full.

    Source: Zhang et al. 2024 (Q-GaLore), arXiv:2407.08296, section 3.3.
    """

    gap: int
    threshold: float = 0.4
    growth: float = 2.0
    queue: int = 5
    limit: float = 8.0
    clear: bool = True
    staggered: bool = True

    def init(self, state: State, place: Place) -> None:
        Every(self.gap, self.staggered).init(state, place)
        similarity = tensor(state, "log.similarity")
        state["gap"], state["queued"] = self.gap, 0
        state["queue"] = similarity.new_zeros(self.queue)
        state["log.gap"] = torch.full_like(similarity, self.gap)

    def due(self, state: State) -> bool:
        return Every(number(state, "gap")).due(state)

    def refreshed(self, state: State) -> None:
        if number(state, "step") < self.gap:
            return
        queue = tensor(state, "queue")
        queue.copy_(queue.roll(-1))
        queue[-1] = tensor(state, "log.similarity")
        state["queued"] = min(number(state, "queued") + 1, self.queue)
        if state["queued"] < self.queue or queue.is_meta:
            return
        if sum(queue.tolist()) / self.queue >= self.threshold:
            longest = max(self.gap, int(self.limit * self.gap))
            state["gap"] = min(int(number(state, "gap") * self.growth), longest)
            tensor(state, "log.gap").fill_(state["gap"])
            if self.clear:
                state["queued"] = 0
