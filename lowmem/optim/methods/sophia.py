"""Sophia: steps clipped at one, behind which stands the curvature."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.optim.curvature import Curved, Estimate
from lowmem.optim.formats import (
    Float32,
    Format,
    State,
    fill_zero,
    format_named,
    tensor,
    turned,
)
from lowmem.optim.method import ByRole
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Direction

_UNCLIPPED = "log.unclipped"


@dataclass(frozen=True)
class Sophia:
    """clip(M / max(gamma H, eps), 1): H is the moving average of the estimates, 0 before any.

    Source: Liu et al., arXiv:2305.14342, Algorithm 3, lines 8 to 13.
    """

    betas: tuple[float, float] = (0.96, 0.99)
    gamma: float = 0.05
    eps: float = 1e-12
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.format.zeros(state, "exp_avg", like, signed=True)
        self.format.zeros(state, "hessian", like, signed=False)
        state[_UNCLIPPED] = torch.zeros((), device=like.device)

    def curve(self, estimate: Estimate, state: State) -> None:
        second = self.betas[1]
        for at, found in estimate:
            hessian = self.format.load(state, "hessian", at)
            hessian.mul_(second).add_(found, alpha=1 - second)
            self.format.store(state, "hessian", at, hessian)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        first = self.betas[0]
        unclipped = tensor(state, _UNCLIPPED).zero_()

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            moved = (self.format.load(state, "hessian", at) * self.gamma).clamp_(min=self.eps)
            torch.div(exp_avg, moved, out=moved)
            self.format.store(state, "exp_avg", at, exp_avg)
            unclipped.add_((moved.abs() < 1).sum(), alpha=1 / gradient.numel())
            return moved.clamp_(-1.0, 1.0)

        return Direction(of)

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg", "hessian")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        turned(self.format, state, "exp_avg", transition, right)
        turned(self.format, state, "hessian", transition.square(), right)


def sophia(
    *,
    betas: Betas = (0.96, 0.99),
    gamma: PositiveFloat = 0.05,
    gap: PositiveInt = 10,
    eps: Eps = 1e-12,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Sophia-G: momentum over the Gauss-Newton curvature, each element's step clipped at lr.

        M <- b1 M + (1 - b1) G
        every `gap` updates, from the first:  H <- b2 H + (1 - b2) B g^2
        W <- (1 - lr wd) W - lr * clip(M / max(gamma H, eps), 1)

    g is the gradient of the mean loss for targets drawn from the model's own predictions, over all
    B tokens of the update (the released code puts B beside gamma instead, which is the same for a
    constant batch; it adds eps 1e-15 where the paper takes the larger). g is not clipped. Larger
    gamma clips less: the log's `unclipped`, the share of elements that move by less than lr,
    should stay between 0.1 and 0.5. Only update mode unfused: g is needed whole.

    H = 0 before any estimate, so every element moves by lr: the sign of M.

    Source: Liu et al. 2023, arXiv:2305.14342, Algorithms 2 and 3. State: two moments of the
    weight's shape.
    """
    rule = Sophia(betas, gamma, eps, format_named(states, min_8bit, floor_codes))
    method = Curved(rule, curvature="gauss-newton", gap=gap)
    return ByRole(method, method)


SPEC = MethodSpec(
    sophia,
    {
        "130m": {"lr": 6e-4, "gamma": 0.05},
        "350m": {"lr": 5e-4, "gamma": 0.05},
        "1b": {"lr": 3e-4, "gamma": 0.05},
    },
    "released README, GPT-2 of 125M, 355M and 770M; decay 0.2, 480 sequences of 1024",
)
