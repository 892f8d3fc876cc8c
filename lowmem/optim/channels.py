"""Lifts that use the gradient itself, scaled by how much the rule scaled its projection.

    ScaledResidual(alpha=0.25)           Fira: the direction inside the subspace, and outside it
                                         the gradient, scaled channel by channel
    ChannelScaling("tensor", alpha=11.3) APOLLO: the whole gradient, scaled

A channel is a line across the rank axis of the projection: a row of the gradient where the basis
is on the right, a column where it is on the left.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowmem.kernels.drawn_projection import channel_norms, line_norms
from lowmem.kernels.scaled_write import Scaled
from lowmem.kernels.unproject_write import Product
from lowmem.optim.formats import State
from lowmem.optim.limiters import NormGrowth
from lowmem.optim.projectors import Projector
from lowmem.optim.weights import Step

Form = Literal["released", "paper"]
Per = Literal["channel", "tensor"]


@dataclass(frozen=True)
class ScaledResidual:
    """The direction mapped back, plus the scaled rest of the gradient, which the limiter limits.

        phi_j = |N_j| / (|R_j| + 1e-8) per channel;   back(X) = P X or X P'
        released:  Z = phi (G - alpha back(R));   D = alpha back(N) + Z/f
        paper:     Z = phi (G - back(R));         D = alpha (back(N) + Z/f)

    f is the limiter's. With s = phi/f both are  alpha back(N - s R) + c s G,  c = 1 or alpha: one
    product instead of two, and nothing of full size but G. With orthonormal P also
        |Z|^2 = sum_j phi_j^2 (|G_j|^2 - (2a - a^2) |R_j|^2),   a = alpha or 1,
    where a basis stored in bf16 counts as orthonormal: only the limiter sees the difference, about
    1 % of |phi G| where hardly anything is outside the subspace.

    Source: Chen et al. 2024 (Fira), arXiv:2410.01623, Algorithm 1 (paper) and released code.
    """

    alpha: float = 0.25
    form: Form = "released"
    limiter: NormGrowth = NormGrowth()  # noqa: RUF009 - frozen, shared on purpose
    needs_gradient: ClassVar[bool] = True

    def init(self, state: State, weight: Tensor) -> None:
        self.limiter.init(state, weight.device)

    def __call__(
        self,
        kept: Tensor,
        low: Tensor,
        direction: Tensor,
        factor: float,
        projector: Projector,
        state: State,
    ) -> Step:
        right, released = bool(state["right"]), self.form == "released"
        scales = channel_factors(direction, low, right)
        taken_out = self.alpha if released else 1.0
        squares = line_norms(low, int(right)).square_().mul_(taken_out * (taken_out - 2))
        # Rounding can make a channel that lies in the subspace slightly negative.
        squares.add_(channel_norms(kept, right).square_()).clamp_(min=0.0)
        norm = torch.linalg.vector_norm(squares.sqrt_().mul_(scales))
        scales.mul_(self.limiter.shrink(norm, state))
        direction.addcmul_(low, scales, value=-1.0).mul_(self.alpha * factor)
        inside = projector.up(direction, state)
        assert isinstance(inside, Product)
        return replace(
            inside, rest=Scaled(kept, scales, factor * (1.0 if released else self.alpha))
        )


@dataclass(frozen=True)
class ChannelScaling:
    """The whole gradient, scaled per channel or as one; the limiter limits the result.

        X = alpha G phi / f,   phi_j = |N_j| / (|R_j| + 1e-8), or of the whole N and R

    f is the limiter's and comes from |G phi| = sqrt(sum_j phi_j^2 |G_j|^2), so X is never formed.
    scale: alpha^2, which is how the released code calls it.

    Source: Zhu et al. 2024 (APOLLO), arXiv:2412.05270, Algorithm 1.
    """

    per: Per = "channel"
    alpha: float = 1.0
    limiter: NormGrowth = NormGrowth()  # noqa: RUF009 - frozen, shared on purpose
    scale: float = field(init=False)
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(f"{self.alpha**2:.12g}"))  # sqrt(128)^2 is 128

    def init(self, state: State, weight: Tensor) -> None:
        self.limiter.init(state, weight.device)

    def __call__(
        self,
        kept: Tensor,
        low: Tensor,
        direction: Tensor,
        factor: float,
        projector: Projector,
        state: State,
    ) -> Step:
        right = bool(state["right"]) or self.per == "tensor"  # rows of any are quicker to read
        return self.with_norms(kept, low, channel_norms(kept, right), direction, factor, state)

    def with_norms(
        self,
        kept: Tensor,
        low: Tensor,
        norms: Tensor,
        direction: Tensor,
        factor: float,
        state: State,
    ) -> Step:
        axis = int(bool(state["right"]))
        if self.per == "tensor":  # both as one long channel
            direction, low, axis = direction.reshape(1, -1), low.reshape(1, -1), 1
        over, under = (line_norms(each, axis) for each in (direction, low))
        return Scaled(kept, self.limiter.limited(over, under, norms, state), self.alpha * factor)


def channel_factors(direction: Tensor, low: Tensor, right: bool) -> Tensor:
    """How much the rule scaled each channel, estimated in the subspace: |N_j| / (|R_j| + 1e-8).

    direction, low: (m, r) or (r, n); the result has size 1 along the rank axis, float32.

    Source: Fira, arXiv:2410.01623 (norm-based scaling); APOLLO, arXiv:2412.05270.
    """
    # The rank axis is known from the side; comparing the lengths fails where r is not the smaller.
    over, under = (line_norms(each, int(right)) for each in (direction, low))
    return over.div_(under.add_(1e-8))
