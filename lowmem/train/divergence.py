"""Bad updates: a loss or gradient that is not finite, and spikes. Skip, roll back, or give up.

A bad update makes no step and its batch is left behind. More than `skips` of them in one incident,
and the run goes back: to the newest checkpoint that is `back` updates older than the first of
them, and from there over the same batches to that place, then past all up to the last bad one. The
second rollback of an incident begins twice as far back, and so on.

Which updates are bad is a function of the losses and norms before them, and what is remembered is
in the checkpoint. So a run that was stopped or killed anywhere decides as an unbroken one.

In `fused` and layer-major mode weights have moved before anybody knows: a gradient that is not
finite has spoilt them, and the run goes back at once; a spike is left as it is, counted, and undone
by the rollback that a longer incident brings.

Source of the remedy: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5.1; of the score:
Iglewicz and Hoaglin 1993, the modified z-score.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor
from typing_extensions import TypedDict

from lowmem.config.schema import CALM, MOVE_EARLY, GuardConfig
from lowmem.data.batches import TrainingOrder
from lowmem.errors import DivergedError

_TO_DEVIATION = 1.4826  # of a normal distribution: its median absolute deviation is 1 / 1.4826
# Relative to the median, what the deviation is taken to be at least: an equal loss for 100 updates
# (a constant learning rate of 0, say) must not turn rounding into a spike.
_LEAST_LOSS_DEVIATION, _LEAST_NORM_DEVIATION = 1e-3, 5e-2

LEFT_OUT = "its batch is left out since a rollback"

Verdict = Literal["skip", "roll back", "give up"]


@dataclass(frozen=True)
class RollBack:
    """Go back to a checkpoint of at most `first` updates; leave out the batches first to last."""

    why: str
    first: int
    last: int
    number: int


class Memory(TypedDict):
    """A `Guard` without its configuration, as plain JSON."""

    losses: list[float]
    norms: list[float]
    first_bad: int | None
    last_bad: int
    bad: int
    rollbacks: int
    left_out: list[tuple[int, int]]


@dataclass
class Guard:
    """What is remembered of good and bad updates.

    losses, norms: of the last good ones. first_bad, bad: of the incident that is going on, None
    and 0 without. last_bad: the end of the last. rollbacks: of this incident. left_out: (first,
    last) of the batches that rollbacks stepped past.
    """

    config: GuardConfig
    losses: deque[float] = field(default_factory=deque)
    norms: deque[float] = field(default_factory=deque)
    first_bad: int | None = None
    last_bad: int = -1
    bad: int = 0
    rollbacks: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)

    @staticmethod
    def of(config: GuardConfig, state: Memory | None) -> "Guard":
        """As `state` says, which `Guard.state` has made; None: at the beginning of a run."""
        if state is None:
            return Guard(config, deque(maxlen=config.window), deque(maxlen=config.window))
        losses, norms = (deque(state[key], config.window) for key in ("losses", "norms"))
        return Guard(
            config,
            losses,
            norms,
            state["first_bad"],
            state["last_bad"],
            state["bad"],
            state["rollbacks"],
            [(first, last) for first, last in state["left_out"]],
        )

    def state(self) -> Memory:
        """Everything but the configuration."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "first_bad": self.first_bad,
            "last_bad": self.last_bad,
            "bad": self.bad,
            "rollbacks": self.rollbacks,
            "left_out": list(self.left_out),
        }

    def leaves_out(self, update: int) -> bool:
        """Did a rollback decide to step past the batch of this update?"""
        return any(first <= update <= last for first, last in self.left_out)

    def trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong with an update of this loss and gradient norm; None: nothing."""
        told = f"loss {loss:.5g}, gradient norm {norm:.5g}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"{told}: not finite"
        for what, value, known, limit, least in (
            ("loss", loss, self.losses, self.config.loss_z, _LEAST_LOSS_DEVIATION),
            ("gradient norm", norm, self.norms, self.config.norm_z, _LEAST_NORM_DEVIATION),
        ):
            if limit == "off" or 2 * len(known) < self.config.window:
                continue
            score, median = robust_score(value, known, least)
            if score > limit:
                return f"{told}: the {what} is {score:.0f} deviations above its median {median:.5g}"
        return None

    def accept(self, update: int, loss: float, norm: float) -> None:
        """Remember a good update; the incident is over after enough of them."""
        self.losses.append(loss)
        self.norms.append(norm)
        if update >= self.last_bad + CALM:
            self.first_bad, self.bad, self.rollbacks = None, 0, 0

    def refuse(self, update: int, *, spoilt: bool) -> Verdict:
        """Remember a bad update; what to do. spoilt: the weights are beyond use."""
        if self.first_bad is None:
            self.first_bad = update
        self.last_bad = update
        self.bad += 1
        if not spoilt and self.bad <= self.config.skips:
            return "skip"
        return "roll back" if self.rollbacks < self.config.rollbacks else "give up"

    def rollback(self, why: str) -> RollBack:
        """Where to begin again, and which batches to leave out."""
        assert self.first_bad is not None, "nothing bad has happened"
        number = self.rollbacks + 1
        first = max(0, self.first_bad - number * self.config.back)
        return RollBack(why, first, self.last_bad, number)

    def rolled_back(self, made: RollBack) -> None:
        """This is the memory of the checkpoint that the run has gone back to."""
        self.first_bad, self.bad = None, self.config.skips  # the next bad one goes back at once
        self.rollbacks, self.last_bad = made.number, made.last
        self.left_out.append((made.first, made.last))


def robust_score(value: float, known: Iterable[float], least: float) -> tuple[float, float]:
    """(how many deviations `value` lies above the median of what is known, that median).

    The deviation is the median absolute one, scaled to a normal distribution's, and at least
    `least` times the median.
    """
    values = list(known)
    median = statistics.median(values)
    spread = _TO_DEVIATION * statistics.median(abs(one - median) for one in values)
    return (value - median) / max(spread, least * abs(median), 1e-30), median


def sequences_of(batches: TrainingOrder, update: int) -> list[str]:
    """Where the sequences of an update stand: "train-00000.bin at token 123", for `data verify`."""
    return [f"{file} at token {token}" for file, token in batches.places_of(update)]


def not_finite(loss: Tensor, norm: Tensor) -> bool:
    return not (math.isfinite(loss.item()) and math.isfinite(norm.item()))


def diverged(
    update: int, trouble: str, mode: str, guard: Guard, healthy: Path | None
) -> DivergedError:
    """The end of a run that no rollback has helped. healthy: its checkpoint from before."""
    early = mode in MOVE_EARLY
    made = "weights changed during backward" if early else "the update was not made"
    tries = f"{guard.bad} bad updates and {guard.rollbacks} rollbacks in this incident"
    left = f"the newest checkpoint from before is {healthy}" if healthy else "nothing was saved yet"
    return DivergedError(
        f"update {update}: {trouble}",
        f"{made}; {tries}; {left}",
        "a new run with a lower --lr, or with --clip; [guard] in the configuration says when a"
        " run gives up",
    )
