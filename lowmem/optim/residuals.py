"""Lifts that train what lies outside the subspace too, by a rule that needs no state.

SignResidual(scale=1.0, residual_scale=1.0)   the sign of the remainder
SgdResidual(scale=1.0, residual_scale=1.0)    the remainder itself
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowmem.optim.formats import State
from lowmem.optim.projectors import Projector
from lowmem.optim.weights import Step

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative to the largest gradient: what a remainder that should be zero may be."""


@dataclass(frozen=True)
class SignResidual:
    """scale * (direction mapped back + residual_scale * sign(Z)),  Z = G - back(R).

    noise: |Z| up to this share of max|G| counts as zero, because the sign would make a full step
    of a rounding error: `ROUNDING` where a basis multiplies, 0 where entries are only chosen. For
    the same reason nothing outside is trained where the projector says that nothing is left out
    (state["whole"]). Z is made row group by row group.

    Source: FRUGAL, arXiv:2411.07837.
    """

    scale: float = 1.0
    residual_scale: float = 1.0
    noise: float = ROUNDING
    needs_gradient: ClassVar[bool] = True

    def init(self, state: State, weight: Tensor) -> None:
        """No state."""

    def __call__(
        self,
        kept: Tensor,
        low: Tensor,
        direction: Tensor,
        factor: float,
        projector: Projector,
        state: State,
    ) -> Step:
        inside = projector.up(direction.mul_(self.scale * factor), state)
        if state["whole"]:
            return inside
        captured = projector.up(low, state)
        limit = torch.linalg.vector_norm(kept, float("inf"), dtype=torch.float32).mul_(self.noise)
        share = self.scale * self.residual_scale

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            inside(rows, start, stop, alpha)
            rest = kept[start:stop].to(torch.float32, copy=True)
            captured(rest, start, stop, -1.0)
            rows.add_(rest.masked_fill_(rest.abs() <= limit, 0.0).sign_(), alpha=alpha * share)

        return step


@dataclass(frozen=True)
class SgdResidual:
    """scale * (direction mapped back + residual_scale * Z),  Z = G - back(R).

    Computed as  scale * (back(direction - c R) + c G):  one product, and Z is never formed.

    Source: FRUGAL, arXiv:2411.07837.
    """

    scale: float = 1.0
    residual_scale: float = 1.0
    needs_gradient: ClassVar[bool] = True

    def init(self, state: State, weight: Tensor) -> None:
        """No state."""

    def __call__(
        self,
        kept: Tensor,
        low: Tensor,
        direction: Tensor,
        factor: float,
        projector: Projector,
        state: State,
    ) -> Step:
        direction.mul_(factor).sub_(low, alpha=self.residual_scale)
        inside = projector.up(direction.mul_(self.scale), state)
        share = self.scale * self.residual_scale

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            inside(rows, start, stop, alpha)
            rows.add_(kept[start:stop], alpha=alpha * share)

        return step
