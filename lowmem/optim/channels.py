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

from lowmem.kernels.slices import row_slices
from lowmem.kernels.unproject_write import Product, Rest
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
        squares = _norms(low, int(right)).square_().mul_(taken_out * (taken_out - 2))
        # Rounding can make a channel that lies in the subspace slightly negative.
        squares.add_(channel_norms(kept, right).square_()).clamp_(min=0.0)
        norm = torch.linalg.vector_norm(squares.sqrt_().mul_(scales))
        scales.mul_(self.limiter.shrink(norm, state))
        direction.addcmul_(low, scales, value=-1.0).mul_(self.alpha * factor)
        inside = projector.up(direction, state)
        assert isinstance(inside, Product)
        return replace(inside, rest=Rest(kept, scales, factor * (1.0 if released else self.alpha)))


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
        right = bool(state["right"])
        if self.per == "channel":
            scales = channel_factors(direction, low, right)
            norm = torch.linalg.vector_norm(channel_norms(kept, right).mul_(scales))
        else:
            # Both as one long channel.
            scales = channel_factors(direction.reshape(1, -1), low.reshape(1, -1), right=True)
            norm = torch.linalg.vector_norm(channel_norms(kept, right=True)) * scales.view(())
        scales.mul_(self.limiter.shrink(norm, state))
        return _scaled(kept, scales, self.alpha * factor)


def channel_factors(direction: Tensor, low: Tensor, right: bool) -> Tensor:
    """How much the rule scaled each channel, estimated in the subspace: |N_j| / (|R_j| + 1e-8).

    direction, low: (m, r) or (r, n); the result has size 1 along the rank axis, float32.

    Source: Fira, arXiv:2410.01623 (norm-based scaling); APOLLO, arXiv:2412.05270.
    """
    # The rank axis is known from the side; comparing the lengths fails where r is not the smaller.
    over, under = (_norms(each, int(right)) for each in (direction, low))
    return over.div_(under.add_(1e-8))


def channel_norms(full: Tensor, right: bool) -> Tensor:
    """Norms of the rows (right) or columns of (m, n), float32, of size 1 along the other axis.

    One pass; no temporary is larger than one group of rows.
    """
    if right and full.dtype == torch.float32:
        return _norms(full, 1)
    if right:
        norms = torch.empty(full.shape[0], 1, device=full.device)
        for start, stop in row_slices(full):
            norms[start:stop] = _norms(full[start:stop], 1)
        return norms
    squares = torch.zeros(1, full.shape[1], device=full.device)
    for start, stop in row_slices(full):
        squares += full[start:stop].float().square().sum(dim=0)
    return squares.sqrt_()


def _norms(values: Tensor, axis: int) -> Tensor:
    return torch.linalg.vector_norm(values, dim=axis, keepdim=True, dtype=torch.float32)


def _scaled(full: Tensor, scales: Tensor, factor: float) -> Step:
    """A step of factor * full * scales; scales: (m or 1, n or 1)."""
    scales = scales.expand(full.shape[0], -1)

    def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
        rows.addcmul_(full[start:stop], scales[start:stop], value=alpha * factor)

    return step
