"""Stable-SPAM: Adam on gradients that are clipped and normalised by their own history."""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.slices import flat_slices
from lowmem.optim.formats import Float32, Format, State, fill_zero, format_named, number, tensor
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Beta, Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction


class Ages(NamedTuple):
    """Updates behind the statistics of the gradient and behind the moments, this one included."""

    statistics: int
    moments: int
    forget: bool  # empty the moments before this update


@dataclass(frozen=True)
class StableSpam:
    """The rule. State beside the moments: three 0-dim averages of max|G|, ||G|| and ||G||^2."""

    betas: tuple[float, float]
    eps: float
    gammas: tuple[float, float, float]
    period: int
    total: int
    eta_min: float
    released_order: bool
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        Adam(format=self.format).init(state, like, place)
        for key in ("max_avg", "norm_avg", "norm_sq_avg"):
            state[key] = torch.zeros((), device=like.device)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        update = number(state, "step")
        ages = self._ages(update)
        if ages.forget:
            self.reset(state)
        share = self._share(update)
        first, second = self.betas[0] * share, self.betas[1]
        limit, shrink = self._clipping(gradient, state, ages.statistics)
        norm = _clipped_norm(gradient, limit, shrink)
        scale = self._normalisation(norm, state, self.gammas[0] * share, ages.statistics)
        root = math.sqrt(1 - second**ages.moments)

        def of(piece: Tensor, at: slice) -> Tensor:
            piece = _clipped(piece, limit, shrink).mul_(scale)
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg_sq = self.format.load(state, "exp_avg_sq", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            exp_avg_sq.mul_(second).addcmul_(piece, piece, value=1 - second)
            moved = exp_avg_sq.sqrt().div_(root).add_(self.eps)
            torch.div(exp_avg, moved, out=moved)
            self.format.store(state, "exp_avg", at, exp_avg)
            self.format.store(state, "exp_avg_sq", at, exp_avg_sq)
            return moved

        return Direction(of, 1 / (1 - first**ages.moments))

    def _ages(self, update: int) -> Ages:
        if not self.period:
            return Ages(update, update, forget=False)
        if not self.released_order:
            since = update % self.period + 1 if update >= self.period else update
            return Ages(update, since, forget=update % self.period == 0)
        # One counter, set to 1 amid the update that resets; the old moments serve that update.
        last = (update - 1) // self.period * self.period
        counter = update - last + 1 if last else update
        ends = update % self.period == 0
        return Ages(counter, 1 if ends else counter, forget=last > 0 and update == last + 1)

    def _share(self, update: int) -> float:
        """What is left of b1 and gamma1: a cosine to eta_min over `total` updates."""
        if not self.total:
            return 1.0
        if update > self.total:
            return self.eta_min
        falling = (1 + math.cos(math.pi * update / (self.total + 1))) / 2
        return self.eta_min + (1 - self.eta_min) * falling

    def _clipping(self, gradient: Tensor, state: State, age: int) -> tuple[Tensor, Tensor]:
        """(limit of |G|, what elements above it are multiplied by)."""
        largest = torch.linalg.vector_norm(gradient, float("inf"), dtype=torch.float32)
        decay = self.gammas[2]
        average = tensor(state, "max_avg").mul_(decay).add_(largest, alpha=1 - decay)
        limit = average / (1 - decay**age)
        return limit, limit / largest

    def _normalisation(self, norm: Tensor, state: State, first: float, age: int) -> Tensor:
        """The factor that brings the gradient to its usual norm; 1 for a zero gradient."""
        second = self.gammas[1]
        mean = tensor(state, "norm_avg").mul_(first).add_(norm, alpha=1 - first)
        square = tensor(state, "norm_sq_avg").mul_(second).add_(norm.square(), alpha=1 - second)
        usual = (mean / (1 - first**age)) / ((square / (1 - second**age)).sqrt() + self.eps)
        return torch.where(norm == 0, 1.0, usual / norm)

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg", "exp_avg_sq")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        Adam(format=self.format).rotate(state, transition, right)


def _clipped(piece: Tensor, limit: Tensor, shrink: Tensor) -> Tensor:
    return torch.where(piece.abs() > limit, piece * shrink, piece)


def _clipped_norm(gradient: Tensor, limit: Tensor, shrink: Tensor) -> Tensor:
    flat = gradient.view(-1)
    total = torch.zeros((), device=gradient.device)
    for piece in flat_slices(flat):
        total += _clipped(flat[piece].float(), limit, shrink).square_().sum()
    return total.sqrt_()


def stable_spam(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    gammas: tuple[Beta, Beta, Beta] = (0.7, 0.9, 0.999),
    period: NonNegativeInt = 1000,
    total: NonNegativeInt = 0,
    eta_min: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5,
    released_order: bool = False,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Stable-SPAM: adaptive spike clipping, adaptive gradient norm, momentum reset.

        x <- g3 x + (1 - g3) max|G|;  elements above x/(1 - g3^k) are scaled down to at most that
        a <- g1 a + (1 - g1) ||G||;   v <- g2 v + (1 - g2) ||G||^2
        G <- G/||G|| * a/(1 - g1^k) / (sqrt(v/(1 - g2^k)) + eps);  then Adam
        every `period` updates the moments start again (0: never)

    total: b1 and g1 fall by a cosine to `eta_min` of themselves over that many updates (0: they
    stay). released_order: the authors' code restarts the count k of x, a and v too, but not these,
    and clears the moments one update late; by default the counts are separate and the reset comes
    before the update.

    Source: Huang et al. 2025, arXiv:2502.17055, Algorithm 1. State: two moments of the weight's
    shape and three numbers.
    """
    rule = StableSpam(
        betas,
        eps,
        gammas,
        period,
        total,
        eta_min,
        released_order,
        format_named(states, min_8bit, floor_codes),
    )
    method = Dense(rule)
    return ByRole(method, method)


SPEC = MethodSpec(
    stable_spam,
    {
        "130m": {"lr": 8e-4, "gammas": (0.85, 0.99999, 0.999)},
        "350m": {"lr": 4e-4, "period": 500},
    },
    "arXiv:2502.17055, released scripts: 130M in BF16, 350M in 4 bits",
)
