"""AdaBelief: Adam whose second moment measures the surprise of the gradient."""

import math
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
class AdaBelief:
    """Adam with (G - M)^2 + eps in place of G^2; eps adds up in S, as published."""

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float]
    eps: float
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        Adam(format=self.format).init(state, like, place)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        (first, second), k = self.betas, age(state)
        root = math.sqrt(1 - second**k)

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg_sq = self.format.load(state, "exp_avg_sq", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            moved = piece - exp_avg
            exp_avg_sq.mul_(second).addcmul_(moved, moved, value=1 - second).add_(self.eps)
            torch.sqrt(exp_avg_sq, out=moved).div_(root).add_(self.eps)
            torch.div(exp_avg, moved, out=moved)
            self.format.store(state, "exp_avg", at, exp_avg)
            self.format.store(state, "exp_avg_sq", at, exp_avg_sq)
            return moved

        return Direction(of, 1 / (1 - first**k))

    def reset(self, state: State) -> None:
        Adam(format=self.format).reset(state)

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        Adam(format=self.format).rotate(state, transition, right)


def adabelief(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-16,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """AdaBelief: large steps where the gradient is as expected, small ones where it is not.

        M <- b1 M + (1 - b1) G;  S <- b2 S + (1 - b2) (G - M)^2 + eps
        W <- (1 - lr wd) W - lr * M/(1 - b1^k) / (sqrt(S/(1 - b2^k)) + eps)

    Without the rectification of the later releases.

    Source: Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2. State: two moments of the weight's
    shape.
    """
    method = Dense(AdaBelief(betas, eps, format_named(states, min_8bit, floor_codes)))
    return ByRole(method, method)


SPEC = MethodSpec(
    adabelief,
    {"any": {"lr": 1e-3}},
    "arXiv:2010.07468, default; nothing published at these sizes",
)
