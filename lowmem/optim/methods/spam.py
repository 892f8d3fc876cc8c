"""SPAM: Adam that clips spiked gradient elements and forgets its moments now and then."""

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import Float32, Format, State, fill_zero, format_named, number
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction

_WARMUP_FROM = 0.01  # of the full step, in the update that forgets the moments


@dataclass(frozen=True)
class Spam:
    """Adam (bias "step") behind clipping and reset; k counts updates and is never reset."""

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float]
    eps: float
    threshold: float
    period: int
    settle: int
    warmup: int
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    @property
    def _adam(self) -> Adam:
        return Adam(self.betas, self.eps, "step", self.format)

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self._adam.init(state, like, place)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        k = number(state, "step")
        if self.period and k % self.period == 0:
            self.reset(state)
        adam = self._adam.direction(gradient, state)
        clips = self._clips(k)

        def of(piece: Tensor, at: slice) -> Tensor:
            if clips:
                limit = self.format.load(state, "exp_avg_sq", at).mul(self.threshold).sqrt_()
                # An element that had no gradient so far, as of a rare token, would be held at 0.
                limit.masked_fill_(limit == 0, math.inf)
                piece = piece.clamp(-limit, limit)
            return adam.of(piece, at)

        return Direction(of, adam.factor * self._share(k))

    def _clips(self, k: int) -> bool:
        """Is V old enough to judge by? An empty one would clip everything to zero."""
        since = k % self.period if self.period else k
        return self.threshold > 0 and k >= self.settle and since >= self.settle

    def _share(self, k: int) -> float:
        """The share of the full step, rising for `warmup` updates after a reset."""
        since = k % self.period if self.period and k >= self.period else self.warmup
        if since >= self.warmup:
            return 1.0
        falling = (1 + math.cos(math.pi * since / (self.warmup + 1))) / 2
        return 1 - (1 - _WARMUP_FROM) * falling

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg", "exp_avg_sq")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        self._adam.rotate(state, transition, right)


def spam(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-6,
    threshold: NonNegativeFloat = 5000.0,
    period: NonNegativeInt = 500,
    settle: NonNegativeInt = 20,
    warmup: NonNegativeInt = 150,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """SPAM: spike-aware Adam with momentum reset.

        where G^2 > threshold V:  G <- sign(G) sqrt(threshold V)
        Adam(G); every `period` updates M = V = 0, then `warmup` updates rising from 1 % of the step

    There is no clipping in the `settle` updates after a reset, while V still fills, nor, unlike in
    the released code, where V is 0. threshold = 0 never clips, period = 0 never forgets. Decay
    follows the step. The sparse form (a random mask of trained elements) is not offered.

    Source: Huang et al. 2025, arXiv:2501.06842, Algorithm 1. State: two moments of the weight's
    shape.
    """
    spiking = Spam(
        betas,
        eps,
        threshold,
        period,
        settle,
        warmup,
        format_named(states, min_8bit, floor_codes),
    )
    method = Dense(spiking, decay_first=False)
    return ByRole(method, method)


SPEC = MethodSpec(
    spam,
    {"130m": {"lr": 8e-4}, "350m": {"lr": 4e-4}, "1b": {"lr": 2e-3}},
    "arXiv:2501.06842, released C4 scripts",
)
