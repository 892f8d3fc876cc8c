"""Whole matrices take turns: a share of them follows one rule for a while, the rest another.

    Blocks(0.25, "descending", 200, active=Dense(Adam()), inactive=Dense(Sgd(sign=True)))

Whose turn it is follows from (position, number of matrices, how often the turn has passed), so the
matrices need not see each other. Only those whose turn it is have moments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from lowmem.naming import seed_of
from lowmem.optim.formats import State, number
from lowmem.optim.method import Dense, Needs
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.weights import Step, like

Order = Literal["random", "ascending", "descending", "mirror"]

_NUMBERS = ("step", "seed", "run_seed", "since", "index", "count", "active")


@dataclass(frozen=True)
class Blocks:
    """`active` while it is this matrix' turn, otherwise `inactive`; None: only decay.

    density: share of the matrices whose turn it is, rounded half to even; mirror: to the nearest
    number of pairs, of one matrix from either end. The turn passes every `gap` updates; all moments
    are then forgotten, also those of a matrix that keeps it. Every matrix counts its own updates,
    so one that misses a gradient is passed over, not waited for.

    State: the moments of `active` while it is this one's turn; numbers: since when, index and
    count of the matrices, active.

    Source: FRUGAL, arXiv:2411.07837 and released code; without a rule for the rest BAdam,
    arXiv:2404.02827.
    """

    density: float
    order: Order
    gap: int
    active: Dense
    inactive: Dense | None

    @property
    def needs(self) -> Needs:
        return Needs(self.inactive is not None, decay_first=True)

    def init(self, weight: Tensor, place: Place) -> State:
        state: State = {"step": 0, "seed": place.seed, "run_seed": place.run_seed, "since": 0}
        state["index"], state["count"], state["active"] = place.index, place.count, 0
        if self.has_turn(state, 0):
            self.allocate(weight, state)
        return state

    def has_turn(self, state: State, turn: int) -> bool:
        """Is this matrix active in that turn, from 0?"""
        count = number(state, "count")
        share = share_of(self.density, count, self.order)
        chosen = active_blocks(self.order, count, share, turn, number(state, "run_seed"))
        return number(state, "index") in chosen

    def _passes(self, state: State) -> bool:
        """Does the turn pass before the coming update?"""
        step = number(state, "step")
        return step > 0 and step % self.gap == 0

    def release(self, state: State) -> None:
        """Free the moments of a turn that ends, before other matrices allocate theirs."""
        if self._passes(state) and not self.has_turn(state, number(state, "step") // self.gap):
            _free(state)

    def reallocate(self, weight: Tensor, state: State, numbers: Mapping[str, int | float]) -> None:
        _free(state)
        # A saved turn that these settings would not have given finds no tensors, and is refused.
        if numbers.get("active") and self.has_turn(state, int(numbers.get("since", 0)) // self.gap):
            self.allocate(weight, state)

    def allocate(self, shape_of: Tensor, state: State) -> None:
        """Make this matrix active, with fresh moments."""
        state["active"] = 1
        place = Place(number(state, "seed"), index=number(state, "index"))
        self.active.rule.init(state, shape_of, place)

    def refresh(self, grad: Tensor, state: State) -> None:
        if not self._passes(state):
            return
        self.release(state)
        state["since"] = number(state, "step")
        if state["active"]:
            self.active.rule.reset(state)
        elif self.has_turn(state, number(state, "step") // self.gap):
            self.allocate(grad, state)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        unused = self.inactive is None and not state["active"]
        return grad.new_empty(0, *grad.shape[1:]) if unused else grad

    def update(self, kept: Tensor, state: State) -> Step | None:
        if state["active"]:
            return self.active.update(kept, state)
        if self.inactive is not None:
            return self.inactive.update(kept, state)
        state["step"] = number(state, "step") + 1
        return _nothing


def _free(state: State) -> None:
    for key in [key for key in state if key not in _NUMBERS]:
        del state[key]
    state["active"] = 0


def _nothing(rows: Tensor, start: int, stop: int, alpha: float) -> None:
    """Add nothing; the weight still decays."""


def share_of(density: float, count: int, order: Order) -> int:
    """How many of `count` matrices are active together."""
    if order == "mirror":
        return 2 * min(round(density * count / 2), count // 2)
    return round(density * count)


@lru_cache(maxsize=8)
def active_blocks(order: Order, count: int, share: int, turn: int, seed: int) -> frozenset[int]:
    """Which of `count` matrices are active in that turn, `share` of them; a pure function."""
    match order:
        case "random":
            name = f"blocks/{turn}"
            shuffled = sorted(range(count), key=lambda index: seed_of(seed, name, index))
            return frozenset(shuffled[:share])
        case "ascending":
            return frozenset((turn * share + i) % count for i in range(share))
        case "descending":
            return frozenset((-1 - turn * share - i) % count for i in range(share))
        case "mirror":
            half = max(1, count // 2)
            near = [(turn * (share // 2) + i) % half for i in range(share // 2)]
            return frozenset([*near, *(count - 1 - index for index in near)])


@lru_cache(maxsize=8)
def worst_window(elements: tuple[int, ...], density: float, order: Order) -> frozenset[int]:
    """Of the sets of matrices that are active together, one with the most elements.

    elements: of each matrix, in the model's order. A random order may meet any set: the largest.
    """
    count, share = len(elements), share_of(density, len(elements), order)
    if order == "random":
        largest = sorted(range(count), key=lambda index: elements[index], reverse=True)
        return frozenset(largest[:share])
    windows = [active_blocks(order, count, share, turn, 0) for turn in range(count)]
    return max(windows, key=lambda window: sum(elements[index] for index in window))


def hold_worst_window(optimizer: Optimizer) -> None:
    """Give the turn to a worst window, so that the first update takes the most memory of all.

    For rehearsals: the turn is not theirs, and a run that is to train must not begin so.
    """
    found = [
        (number(slot.state, "index"), slot.method, slot)
        for slot in optimizer.slots.values()
        if isinstance(slot.method, Blocks)
    ]
    found.sort(key=lambda each: each[0])
    elements = tuple(slot.weight.numel() for _, _, slot in found)
    for position, (_, method, slot) in enumerate(found):
        _free(slot.state)
        if position in worst_window(elements, method.density, method.order):
            method.allocate(like(slot.weight), slot.state)
    optimizer.put_states_away()
