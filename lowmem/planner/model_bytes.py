"""What a model takes at every moment of an update whose gradients nobody keeps.

One with a block of each recomputation level is rehearsed: others are made of its blocks.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig, UpdateMode
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.phases import current_phase
from lowmem.planner.live_bytes import LiveBytes
from lowmem.planner.persistent import kin
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import chosen_model, evaluate, standing_for, update

LIKE = ("full", "attn", "keep", "last")
"""The rehearsed blocks: one of each level, and the last, which keeps everything at any level.

With inputs in host memory another one, of the first level, stands before them: in its backward no
input of a block below is on its way.
"""
RECOMPUTE = "keep:2,attn:1,full"  # that gives them


class Piece(NamedTuple):
    """Of a gradient: whole, or some rows. left: micro-batches of a layer-major update after it."""

    start: int
    rows: int
    whole: bool
    left: int


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


def model_bytes(model: ModelConfig, choice: Choice, seq_len: int, attention: str) -> ModelBytes:
    """Rehearse the choice's micro-batch on a model with one block of each level, and the last."""
    away = choice.boundaries == "host" and choice.update != "layer-major"
    blocks = len(LIKE) + away
    if choice.update == "layer-major":  # there the first and the last are different
        blocks = min(blocks, model.num_hidden_layers)
    small = model.model_copy(update={"num_hidden_layers": blocks})
    levels = "full" if choice.update == "layer-major" else RECOMPUTE
    llama = chosen_model(small, choice, attention, levels)
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
        self.recorder.hand(name, Piece(0, len(grad), True, self.left))

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        self.recorder.hand(name, Piece(start, len(rows), False, self.left))

    def wants_survey(self, name: str) -> bool:
        return False  # the moments are those of the rows that follow

    def norm(self) -> Tensor:
        return torch.empty(0, device="meta")

    def clip(self, norm: Tensor, max_norm: float) -> None:
        pass


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


_BLOCK_PHASE = re.compile(r"(forward|backward) of block (\d+)")
