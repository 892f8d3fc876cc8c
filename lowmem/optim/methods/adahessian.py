"""AdaHessian: Adam with the Hessian's diagonal in the place of the squared gradient."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.optim.curvature import Curved, Estimate
from lowmem.optim.formats import (
    Float32,
    Format,
    State,
    fill_zero,
    format_named,
    number,
    turned,
)
from lowmem.optim.method import ByRole
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Direction, age

Block = Literal[1, 2, 4, 8, 16, 32, 64, 128, 256]
"""Lengths that divide the pieces in which weights are visited."""


@dataclass(frozen=True)
class AdaHessian:
    """M/(1 - b1^k) / ((V/(1 - b2^j))^(power/2) + eps), j: estimates so far; without any, M alone.

    Source: Yao et al., arXiv:2006.00719, Algorithm 1.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    power: float = 1.0
    block: int = 32
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.format.zeros(state, "exp_avg", like, signed=True)
        self.format.zeros(state, "hessian_sq", like, signed=False)
        state["block"] = self.block if like.ndim > 1 else 1
        state["estimates"] = 0

    def curve(self, estimate: Estimate, state: State) -> None:
        second, block = self.betas[1], number(state, "block")
        state["estimates"] = number(state, "estimates") + 1
        for at, found in estimate:
            mean = averaged(found.abs_(), block)
            hessian_sq = self.format.load(state, "hessian_sq", at)
            hessian_sq.mul_(second).addcmul_(mean, mean, value=1 - second)
            self.format.store(state, "hessian_sq", at, hessian_sq)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        (first, second), estimates = self.betas, number(state, "estimates")

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            if estimates:
                moved = self.format.load(state, "hessian_sq", at) / (1 - second**estimates)
                moved.pow_(self.power / 2).add_(self.eps)
                torch.div(exp_avg, moved, out=moved)
            else:
                moved = exp_avg.clone()
            self.format.store(state, "exp_avg", at, exp_avg)
            return moved

        return Direction(of, 1 / (1 - first ** age(state)))

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg", "hessian_sq")
        state["estimates"] = 0

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        turned(self.format, state, "exp_avg", transition, right)
        turned(self.format, state, "hessian_sq", transition.square(), right)


def averaged(values: Tensor, block: int) -> Tensor:
    """Every run of `block` elements of values (k,) replaced by its mean, in place; the last run
    may be shorter."""
    if block == 1:
        return values
    full = len(values) // block * block
    for runs in (values[:full].view(-1, block), values[full:].view(1, -1)):
        if runs.numel():
            runs.copy_(runs.mean(1, keepdim=True))
    return values


def adahessian(
    *,
    betas: Betas = (0.9, 0.999),
    power: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0,
    block: Block = 32,
    gap: PositiveInt = 1,
    eps: Eps = 1e-4,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """AdaHessian: Adam whose second moment is of the Hessian's diagonal.

        D = mean over `block` elements of |z (H z)|, z random signs;  norms and biases: no mean
        M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) D^2, every `gap` updates
        W <- (1 - lr wd) W - lr * M/(1 - b1^k) / ((V/(1 - b2^j))^(power/2) + eps)

    j counts the estimates. Magnitudes are averaged, as released; the paper averages signed values.
    H z comes from central differences of the gradient (`curvature.py`): an estimate costs two more
    passes over the batch and a copy of the weights, and needs weights in fp32. Only update mode
    unfused. Before any estimate the Hessian is taken for 1: the step is M/(1 - b1^k).

    Source: Yao et al. 2020, arXiv:2006.00719, Algorithm 1 and equation 10. State: two moments of
    the weight's shape.
    """
    rule = AdaHessian(betas, eps, power, block, format_named(states, min_8bit, floor_codes))
    method = Curved(rule, curvature="hutchinson", gap=gap)
    return ByRole(method, method)


SPEC = MethodSpec(
    adahessian,
    {"any": {"lr": 0.047, "betas": (0.9, 0.98)}},
    "released script for a Transformer on IWSLT14",
)
