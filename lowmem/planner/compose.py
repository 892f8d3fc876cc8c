"""The exact peak of any depth and method, from small rehearsals that candidates share.

Two things are rehearsed apart, once each:

    ModelBytes      a model with a block of each level whose gradients nobody keeps: bytes at every
                    moment, and at which of them each weight's gradient is handed over
    OptimizerBytes  what the optimizer adds, weight by weight: bytes at the worst moment of each
                    call beyond those before it, and bytes that stay

Blocks are alike, so another depth or other recomputation levels are the same moments at other
heights. `compose` walks along an update and adds both up. It equals the rehearsal of the whole
model to the byte (tests/planner/test_compose.py) in a thousandth of the time.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lowmem.config.recompute import levels_of
from lowmem.config.schema import ModelConfig, UpdateMode
from lowmem.model.llama import Llama
from lowmem.optim.method import Dense
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.rules import Sgd
from lowmem.optim.slots import Slot
from lowmem.optim.sums import square as square_of
from lowmem.phases import current_phase
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import (
    VISITED,
    LiveBytes,
    evaluate,
    model_on_meta,
    standing_for,
    stored,
    track_persistent,
    update,
)

LIKE = ("full", "attn", "keep", "last")
"""The rehearsed blocks: one of each level, and the last, which keeps everything at any level.

With inputs in host memory another one, of the first level, stands before them: in its backward no
input of a block below is on its way.
"""
RECOMPUTE = "keep:2,attn:1,full"  # that gives them
_BLOCK_PHASE = re.compile(r"(forward|backward) of block (\d+)")
_BLOCK_NAME = re.compile(r"model\.layers\.(\d+)\.")


def _block(index: int) -> str:
    return f"model.layers.{index}."


def kin(name: str) -> str:
    """A weight's name without the number of its block."""
    return _BLOCK_NAME.sub("", name)


Piece = tuple[int, int, bool, int]
"""Of a gradient: first row, rows, whether it is handed as a whole, and how many micro-batches of a
layer-major update are left."""
Pieces = Mapping[str, list[Piece]]


@dataclass
class Moment:
    """Bytes live at one moment, or the most of several; `handed` names a gradient that then is."""

    live: int
    handed: str = ""  # kin of the weight


@dataclass
class Section:
    """The moments of one phase; start: bytes at the first of them."""

    name: str
    start: int
    moments: list[Moment] = field(default_factory=list)


@dataclass
class Pass:
    """A micro-batch in the order of time; blocks are those of LIKE, or another one and these.

    ahead: bytes of the block below in every backward but the first block's.
    """

    opening: list[Moment] = field(default_factory=list)
    forward: list[Section] = field(default_factory=list)
    turn: list[Moment] = field(default_factory=list)  # final norm, head and loss
    backward: list[Section] = field(default_factory=list)
    closing: list[Moment] = field(default_factory=list)
    ahead: int = 0


@dataclass(frozen=True)
class ModelBytes:
    """passes: one, or the first and a later micro-batch; in layer-major order one, with all of
    them. resting: bytes after the last of them.
    evaluation: the peak of an evaluation batch. pieces: kin of a weight -> of its gradient, as
    they are handed. layer_major: the blocks are the first, others and the last of one level, as
    many as the model has or LIKE. host: bytes of host memory for the input of a block, where they
    wait there and the order is not layer-major.
    """

    passes: list[Pass]
    resting: int
    evaluation: int
    pieces: dict[str, list[Piece]]
    layer_major: bool = False
    host: int = 0


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


class _Recorder(LiveBytes):
    """Keeps every moment of a model whose gradients are dropped when they are handed over.

    Its weights are seen, lest a view of one counts as new, and not counted.
    """

    def __init__(self, llama: Llama, scratch: bool) -> None:
        super().__init__("meta", scratch)
        self.sections: list[Section] = []
        self.track(llama.state_dict(), "weights")
        self.live = self.peak = 0
        self.sections.clear()
        self.pieces: defaultdict[str, list[Piece]] = defaultdict(list)

    def _mark(self, scratch: int, part: str) -> None:
        super()._mark(scratch, part)
        self._remember(self.live + scratch)

    def hand(self, name: str, piece: Piece) -> None:
        self._remember(self.live, kin(name))
        self.pieces[name].append(piece)

    def _remember(self, live: int, handed: str = "") -> None:
        name = (*current_phase(), "")[0]
        if not self.sections or self.sections[-1].name != name:
            self.sections.append(Section(name, live))
        moments = self.sections[-1].moments
        if moments and not handed and not moments[-1].handed:
            moments[-1].live = max(moments[-1].live, live)
        else:
            moments.append(Moment(live, handed))


class _Listener(Optimizer):
    """In the optimizer's place: it tells the recorder and keeps nothing."""

    def __init__(self, recorder: _Recorder, mode: UpdateMode) -> None:
        super().__init__("layer-major" if mode == "layer-major" else "unfused", 0)
        self.recorder = recorder

    def receive(self, name: str, grad: Tensor) -> None:
        self.recorder.hand(name, (0, len(grad), True, self.left))

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        self.recorder.hand(name, (start, len(rows), False, self.left))

    def wants_survey(self, name: str) -> bool:
        return False  # the moments are those of the rows that follow

    def norm(self) -> Tensor:
        return torch.empty(0, device="meta")

    def clip(self, norm: Tensor, max_norm: float) -> None:
        pass


def model_bytes(model: ModelConfig, choice: Choice, seq_len: int, attention: str) -> ModelBytes:
    """Rehearse the choice's micro-batch on a model with one block of each level, and the last."""
    away = choice.boundaries == "host" and choice.update != "layer-major"
    blocks = len(LIKE) + away
    if choice.update == "layer-major":  # there the first and the last are different
        blocks = min(blocks, model.num_hidden_layers)
    small = model.model_copy(update={"num_hidden_layers": blocks})
    logits = choice.logits == "keep"
    llama = model_on_meta(
        small,
        choice.weights,
        "full" if choice.update == "layer-major" else RECOMPUTE,
        attention,
        keep_logits=logits,
        ends=choice.ends,
        boundaries=choice.boundaries,
        blocks=choice.blocks,
        compiled=choice.compiled,
        matmul=choice.matmul,
    )
    recorder = _Recorder(llama, scratch=attention != "cpu")
    listener = _Listener(recorder, choice.update)
    listener.attach(llama)
    with recorder, standing_for(attention):
        loss_and_norm = update(llama, listener, choice, seq_len)
        passes = _passes(recorder.sections)
        for each in passes if away else ():
            each.ahead = _ahead(each)
        recorder.peak = resting = recorder.live
        del loss_and_norm  # training reads them after the step
        evaluate(llama, choice, seq_len)
    pieces = {
        kin(name): found[: len(found) // len(passes)] for name, found in recorder.pieces.items()
    }
    host = recorder.host_peak // (blocks - 1) if away else 0
    layer_major = choice.update == "layer-major"
    return ModelBytes(passes, resting, recorder.peak, pieces, layer_major, host)


def _ahead(each: Pass) -> int:
    """By how much backward of the second block is higher than the first's, which is like it."""
    first, second = (section.moments[0].live for section in each.backward[:2])
    return second - first - (each.forward[1].start - each.forward[0].start)


def _passes(sections: Iterable[Section]) -> list[Pass]:
    """Sections of an update, micro-batch by micro-batch."""
    passes = [Pass()]
    for section in sections:
        match, now = _BLOCK_PHASE.fullmatch(section.name), passes[-1]
        if match is not None:
            getattr(now, match[1]).append(section)
        elif now.backward and section.name.startswith("gradient"):
            now.closing += section.moments
        elif now.backward:
            passes.append(Pass(opening=section.moments))
        else:
            (now.turn if now.forward else now.opening).extend(section.moments)
    for each in passes:
        each.backward.reverse()
    return passes


def persistent_bytes(owner: Optimizer, blocks: int) -> int:
    """Weights and states of a model with so many blocks, from its optimizer or that of two."""
    tracker = LiveBytes("meta")
    second = [name for name in owner.slots if name.startswith(_block(1))]
    track_persistent(tracker, owner, [name for name in owner.slots if name not in second])
    others = tracker.live
    track_persistent(tracker, owner, second)
    return tracker.live + (blocks - _depth(owner)) * (tracker.live - others)


def stored_bytes(owner: Optimizer, blocks: int) -> int:
    """Weights and states in a checkpoint of a model with so many blocks, from the same owner."""

    def of(names: Iterable[str]) -> int:
        slots = [owner.slots[name] for name in names]
        states = [value for slot in slots for value in slot.state.values()]
        weights = [tensor for slot in slots for tensor in stored(slot.weight)]
        return sum(each.nbytes for each in [*weights, *states] if isinstance(each, Tensor))

    second = [name for name in owner.slots if name.startswith(_block(1))]
    return of(owner.slots) + (blocks - _depth(owner)) * of(second)


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
    costs, depth = {}, _depth(owner)
    last = [name for name in measured if name.startswith(_block(depth - 1))]
    for name, cost in measured.items():
        costs[name] = cost
        for index in range(depth, blocks) if name == last[-1] else ():
            costs |= {_block(index) + kin(each): measured[each] for each in last}
    norm = norm_bytes(choice.update, choice.clip is not None, len(costs))
    return OptimizerBytes(persistent_bytes(owner, blocks), costs, norm)


def _depth(owner: Optimizer) -> int:
    return len({match[0] for match in map(_BLOCK_NAME.match, owner.slots) if match})


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
    if pieces[0][2] or not owner.wants_survey(name):
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


def compose(model: ModelBytes, optimizer: OptimizerBytes, recompute: str, blocks: int) -> int:
    """The peak of an update and an evaluation batch, in bytes of live tensors.

    blocks: of the whole model.
    """
    if model.layer_major:
        like = list(range(min(blocks, len(LIKE))))
        like[1:1] = [1] * (blocks - len(like))
    else:
        before = len(model.passes[0].forward) - len(LIKE)
        levels = [*levels_of(recompute, blocks)[:-1], LIKE[-1]]
        like = [before + LIKE.index(level) for level in levels]
    held = most = 0
    for number, each in enumerate(model.passes):
        taken: Counter[str] = Counter()
        for moments, shift, block in _in_time(each, like):
            peak, left = _walked(moments, optimizer.costs, number, block, taken)
            most, held = max(most, held + shift + peak), held + left
    return optimizer.persistent + max(most, _stepped(model, optimizer, held))


def _in_time(each: Pass, like: Sequence[int]) -> Iterator[tuple[list[Moment], int, str]]:
    """(moments, how much higher they are than rehearsed, prefix of the names of their weights).

    like: for every block of the model, which of the rehearsed ones it is like.
    """
    shifts = _shifts(each, like)
    yield each.opening, 0, ""
    for at, shift in zip(like, shifts, strict=True):
        yield each.forward[at].moments, shift, ""
    yield each.turn, shifts[-1], ""
    for index in reversed(range(len(like))):
        shift = shifts[index] - (0 if index else each.ahead)
        yield each.backward[like[index]].moments, shift, _block(index)
    yield each.closing, 0, ""


def _shifts(each: Pass, like: Sequence[int]) -> list[int]:
    """Below a block's moments lies what the blocks before it keep."""
    starts = [section.start for section in each.forward]
    height, shifts = starts[0], []
    for at in like:
        shifts.append(height - starts[at])
        if at + 1 < len(starts):
            height += starts[at + 1] - starts[at]
    return shifts


def _walked(
    moments: Iterable[Moment],
    costs: Mapping[str, Cost],
    number: int,
    block: str,
    taken: Counter[str],
) -> tuple[int, int]:
    """(the highest of these moments with what the optimizer adds, bytes that it keeps).

    taken: of every weight, how many pieces were handed before; a tied head's are the embedding's.
    """
    most = held = 0
    for moment in moments:
        if not moment.handed:
            most = max(most, held + moment.live)
            continue
        name = block + moment.handed
        call = costs[name].received[number][taken[name]]
        taken[name] += 1
        most = max(most, held + moment.live + call.extra)
        held += call.left
    return most, held


def _stepped(model: ModelBytes, optimizer: OptimizerBytes, held: int) -> int:
    """The peak of norm, clipping, `step` and an evaluation batch after the last micro-batch."""
    most, squares = model.resting + held + optimizer.norm.extra, 0
    for cost in optimizer.costs.values():
        most = max(most, model.resting + held + squares + cost.square.extra)
        squares += cost.square.left
    held += optimizer.norm.left
    for cost in optimizer.costs.values():
        most = max(most, model.resting + held + cost.step.extra)
        held += cost.step.left
    held += optimizer.norm.rest - optimizer.norm.left
    return max(most, model.evaluation + held)
