"""EXAdam: Adam whose bias corrections look at both moments, with the gradient added once more."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import Float32, Format, State, format_named
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction, age


@dataclass(frozen=True)
class ExAdam:
    """The rule of `exadam`."""

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float]
    eps: float
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        Adam(format=self.format).init(state, like, place)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        (first, second), k = self.betas, age(state)
        left1, left2 = first**k, second**k

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg_sq = self.format.load(state, "exp_avg_sq", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            exp_avg_sq.mul_(second).addcmul_(piece, piece, value=1 - second)
            scaled = exp_avg.square()
            scaled.div_(scaled + self.eps).mul_(left1).add_(1)  # d2
            scaled.mul_(exp_avg_sq).div_(1 - left2).sqrt_().add_(self.eps)
            moved = exp_avg_sq / (exp_avg_sq + self.eps)
            moved.mul_(left2).add_(1)  # d1
            moved.mul_(exp_avg + piece)
            torch.div(moved, scaled, out=moved)
            self.format.store(state, "exp_avg", at, exp_avg)
            self.format.store(state, "exp_avg_sq", at, exp_avg_sq)
            return moved

        return Direction(of, 1 / (1 - left1))

    def reset(self, state: State) -> None:
        Adam(format=self.format).reset(state)

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        Adam(format=self.format).rotate(state, transition, right)


def exadam(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """EXAdam: cross-moment bias corrections and the present gradient beside the momentum.

        M, V as Adam;  d1 = 1 + V/(V + eps) b2^k;  d2 = 1 + M^2/(M^2 + eps) b1^k
        W <- (1 - lr wd) W - lr * d1 (M + G)/(1 - b1^k) / (sqrt(d2 V/(1 - b2^k)) + eps)

    As in the second version of the paper: the growing step size of the first is gone.

    Source: Adly 2024, arXiv:2412.20302v2, Algorithm 1. State: two moments of the weight's shape.
    """
    method = Dense(ExAdam(betas, eps, format_named(states, min_8bit, floor_codes)))
    return ByRole(method, method)


SPEC = MethodSpec(
    exadam, {"any": {"lr": 1e-3}}, "as adamw; arXiv:2412.20302 has nothing at these sizes"
)
