"""What an optimizer adds to a model's bytes, weight by weight and call by call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowmem.config.schema import UpdateMode
from lowmem.optim.method import Dense
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.rules import Sgd
from lowmem.optim.slots import Slot
from lowmem.optim.sums import square as square_of
from lowmem.planner.live_bytes import LiveBytes
from lowmem.planner.model_bytes import Piece
from lowmem.planner.persistent import (
    block_prefix,
    depth_of,
    kin,
    persistent_bytes,
    track_persistent,
)
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import VISITED, standing_for

Pieces = Mapping[str, list[Piece]]


@dataclass(frozen=True)
class Call:
    """extra: bytes at the worst moment beyond those before. left: bytes after, less before."""

    extra: int
    left: int


@dataclass(frozen=True)
class NormCall(Call):
    """rest: what is left when nobody looks at the norm any more."""

    rest: int


@dataclass(frozen=True)
class Cost:
    """received: calls for the pieces of a gradient, in each pass. square: what `norm` makes of
    what is held. step: that of `step`. host: bytes of host memory that are held.
    """

    received: list[list[Call]]
    square: Call
    step: Call
    host: int


@dataclass(frozen=True)
class OptimizerBytes:
    """persistent: weights and states of the whole model. costs: of all weights, in the order of
    `step`. norm: of all gradients, with clipping.
    """

    persistent: int
    costs: Mapping[str, Cost]
    norm: NormCall

    @property
    def held(self) -> int:
        """Bytes between the micro-batches of an update."""
        return sum(call.left for cost in self.costs.values() for call in cost.received[0])

    @property
    def host(self) -> int:
        """Bytes of host memory at the end of an update's last micro-batch."""
        return sum(cost.host for cost in self.costs.values())


def optimizer_bytes(
    owner: Optimizer, choice: Choice, pieces: Pieces, attention: str, blocks: int
) -> OptimizerBytes:
    """Rehearse an optimizer on meta. Its extra passes, where a method makes any, are left out.

    owner: of a model with two blocks if all are alike, else of the whole model, which has so many
    `blocks`. pieces: of ModelBytes.
    """
    tracker = LiveBytes("meta", scratch=attention != "cpu")
    track_persistent(tracker, owner)
    with tracker, standing_for(attention):
        measured = _costs(tracker, owner, choice, pieces)
    costs, depth = {}, depth_of(owner)
    last = [name for name in measured if name.startswith(block_prefix(depth - 1))]
    for name, cost in measured.items():
        costs[name] = cost
        for index in range(depth, blocks) if name == last[-1] else ():
            costs |= {block_prefix(index) + kin(each): measured[each] for each in last}
    norm = norm_bytes(choice.update, choice.clip is not None, len(costs))
    return OptimizerBytes(persistent_bytes(owner, blocks), costs, norm)


def _costs(tracker: LiveBytes, owner: Optimizer, choice: Choice, pieces: Pieces) -> dict[str, Cost]:
    """Every call for each weight; once for those of different blocks with the same state."""
    owner.begin(0.0, choice.accumulate)
    passes = 1 if choice.update == "layer-major" else min(choice.accumulate, VISITED[choice.update])
    known: dict[str, Cost] = {}
    found = {}
    for name, slot in owner.slots.items():
        tensors = {k: v.shape for k, v in slot.state.items() if isinstance(v, Tensor)}
        alike = f"{kin(name)} {tensors}"
        if alike not in known:
            host = tracker.host
            received = [
                _all_received(tracker, owner, name, pieces[kin(name)]) for _ in range(passes)
            ]
            host = tracker.host - host
            square = _squared(tracker, slot)
            known[alike] = Cost(received, square, _called(tracker, owner.step), host)
        found[name] = known[alike]
    return found


def _all_received(
    tracker: LiveBytes, owner: Optimizer, name: str, pieces: list[Piece]
) -> list[Call]:
    """A survey of the rows is part of the first call: the model makes them at the same height."""
    if pieces[0].whole or not owner.wants_survey(name):
        return [_received(tracker, owner, name, piece) for piece in pieces]
    weight, before, highest = owner.slots[name].weight, tracker.live, 0
    for start, rows, _, _ in pieces:
        others = tracker.live
        gradient = torch.empty((rows, *weight.shape[1:]), dtype=weight.dtype, device="meta")
        tracker.peak, there = tracker.live, tracker.live - others
        owner.survey_rows(name, start, gradient)
        highest = max(highest, tracker.peak - before - there)
        del gradient
    surveyed = tracker.live - before
    first, *later = [_received(tracker, owner, name, piece) for piece in pieces]
    return [Call(max(highest, surveyed + first.extra), surveyed + first.left), *later]


def _received(tracker: LiveBytes, owner: Optimizer, name: str, piece: Piece) -> Call:
    """The gradient itself is there before, and gone after unless the optimizer keeps it."""
    weight, before = owner.slots[name].weight, tracker.live
    start, rows, whole, left = piece
    owner.expect(left)
    gradient = torch.empty((rows, *weight.shape[1:]), dtype=weight.dtype, device="meta")
    tracker.peak = held = tracker.live
    if whole:
        owner.receive(name, gradient)
    else:
        owner.receive_rows(name, start, gradient)
    extra = tracker.peak - held
    del gradient
    return Call(extra, tracker.live - before)


def _squared(tracker: LiveBytes, slot: Slot) -> Call:
    if slot.kept is None:  # the mode is fused, and the weight has moved
        return Call(0, 0)
    tracker.peak = before = tracker.live
    found = square_of(slot.kept)
    call = Call(tracker.peak - before, tracker.live - before)
    del found
    return call


def _called(tracker: LiveBytes, call: Callable[[], object]) -> Call:
    tracker.peak = before = tracker.live
    call()
    return Call(tracker.peak - before, tracker.live - before)


@cache
def norm_bytes(mode: UpdateMode, clipped: bool, weights: int) -> NormCall:
    """The norm of so many gradients, and its clipping, as far as neither depends on their sizes."""
    owner = Optimizer(mode, 0)
    for index in range(weights):
        owner.add(str(index), torch.empty(1, device="meta"), Dense(Sgd()), 0.0)
    owner.begin(0.0, 1)

    with LiveBytes("meta") as tracker:
        for name in owner.slots:
            owner.receive(name, torch.empty(1, device="meta"))
        tracker.peak = before = tracker.live
        norm = owner.norm()
        if clipped:
            owner.clip(norm, 1.0)
        extra, left = tracker.peak - before, tracker.live - before
        del norm
        return NormCall(extra, left, tracker.live - before)
