"""From the subspace back to full size, and what happens to the part of the gradient outside it.

A lift that looks at that part needs the whole gradient: `channels.py` (Fira, APOLLO) and
`residuals.py` (FRUGAL).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from lowmem.optim.formats import State
from lowmem.optim.projectors import Projector
from lowmem.optim.weights import Step


class Lift(Protocol):
    @property
    def needs_gradient(self) -> bool:
        """Is the full gradient needed, or is its projection enough?"""

    def init(self, state: State, weight: Tensor) -> None: ...

    def __call__(
        self,
        kept: Tensor,
        low: Tensor,
        direction: Tensor,
        factor: float,
        projector: Projector,
        state: State,
    ) -> Step:
        """The full-size step.

        kept: the gradient or its projection; low: its projection; direction: float32, of low's
        shape, to be multiplied by factor.
        """


@runtime_checkable
class Normed(Protocol):
    """What else a lift has that needs the gradient's channel norms: they may come from the pass
    that projects it."""

    def with_norms(
        self,
        kept: Tensor,
        low: Tensor,
        norms: Tensor,
        direction: Tensor,
        factor: float,
        state: State,
    ) -> Step:
        """The full-size step. norms: `channel_norms` of kept."""


@dataclass(frozen=True)
class ProjectBack:
    """scale * (direction mapped back): nothing outside the subspace is used.

    Source: Zhao et al. 2024, arXiv:2403.03507, Algorithm 2.
    """

    scale: float = 0.25
    needs_gradient: ClassVar[bool] = False

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
        return projector.up(direction.mul_(self.scale * factor), state)
