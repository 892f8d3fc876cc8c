"""What turns a (projected) gradient into a direction of the same shape, with its own moments."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from lowmem.kernels.slices import flat_slices
from lowmem.optim.formats import Float32, Format, State, number


class Rule(Protocol):
    def init(self, state: State, low: Tensor) -> None:
        """Allocate the moments; `low` shows shape and device."""

    def direction(self, low: Tensor, state: State) -> tuple[Tensor, float]:
        """(direction, factor): the step is factor * direction, before the learning rate.

        Works in place: the result is `low`'s memory.
        """


@dataclass(frozen=True)
class Adam:
    """Adam with one of its two bias corrections; k is the number of this update, from 1.

        M <- b1 M + (1 - b1) R;   V <- b2 V + (1 - b2) R^2
        bias "inside":  direction  M/(1 - b1^k) / (sqrt(V/(1 - b2^k)) + eps),  factor 1
        bias "step":    direction  M / (sqrt(V) + eps),  factor sqrt(1 - b2^k) / (1 - b1^k)

    Source: Kingma & Ba, arXiv:1412.6980, Algorithm 1 ("inside") and the end of its section 2
    ("step", where eps is relative to the uncorrected V).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias: Literal["inside", "step"] = "inside"
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, low: Tensor) -> None:
        self.format.zeros(state, "exp_avg", low, signed=True)
        self.format.zeros(state, "exp_avg_sq", low, signed=False)

    def direction(self, low: Tensor, state: State) -> tuple[Tensor, float]:
        first, second = self.betas
        step = number(state, "step")
        correction1, correction2 = 1 - first**step, 1 - second**step
        flat = low.view(-1)
        for piece in flat_slices(flat):
            gradient = flat[piece].float()
            exp_avg = self.format.load(state, "exp_avg", piece)
            exp_avg_sq = self.format.load(state, "exp_avg_sq", piece)
            exp_avg.mul_(first).add_(gradient, alpha=1 - first)
            exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            if self.bias == "inside":
                denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(self.eps)
                flat[piece] = (exp_avg / denominator).div_(correction1)
            else:
                flat[piece] = exp_avg / exp_avg_sq.sqrt().add_(self.eps)
            self.format.store(state, "exp_avg", piece, exp_avg)
            self.format.store(state, "exp_avg_sq", piece, exp_avg_sq)
        if self.bias == "inside":
            return low, 1.0
        return low, math.sqrt(correction2) / correction1
