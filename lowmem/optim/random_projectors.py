"""Projectors that draw at random, from (seed, number of the draw): nothing drawn is ever stored.

RandomNormal(rank=256)    entries of N(0, 1/r): lengths are kept on average, little else is
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels.drawn_projection import drawn_basis, in_one_pass, project_on_line
from lowmem.naming import seed_of
from lowmem.optim.formats import State, number
from lowmem.optim.place import Place
from lowmem.optim.projectors import lift_back, project, projects_right, rank_of
from lowmem.optim.weights import Step


@dataclass(frozen=True)
class RandomNormal:
    """A matrix of independent normal numbers on the shorter side, drawn anew at each refresh.

    rank: a number or a fraction of that side s; never above it, where the image would be no
    smaller than the gradient. State, all numbers: right, side, rank, and which basis is drawn.

    Source: Zhu et al. 2024 (APOLLO), arXiv:2412.05270, Algorithm 1.
    """

    rank: int | float

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        side = min(weight.shape)
        state["right"] = int(projects_right("std", weight.shape))
        state["side"], state["rank"], state["drawn_basis"] = side, rank_of(self.rank, side), 0

    def refresh(self, grad: Tensor, state: State) -> None:
        state["drawn_basis"] = number(state, "drawn_basis") + 1

    def basis(self, state: State, device: torch.device | str = "cpu") -> Tensor:
        """(s, r) float32, not orthonormal."""
        return drawn_basis(number(state, "side"), number(state, "rank"), _seed(state), device)

    def down(self, full: Tensor, state: State) -> Tensor:
        return project(full, self.basis(state, full.device).to(full.dtype), bool(state["right"]))

    def down_with_norms(self, full: Tensor, state: State) -> tuple[Tensor, Tensor] | None:
        if number(state, "rank") != 1 or not in_one_pass(full):
            return None
        return project_on_line(full, _seed(state), bool(state["right"]))

    def up(self, low: Tensor, state: State) -> Step:
        return lift_back(low, self.basis(state, low.device), bool(state["right"]))


def _seed(state: State) -> int:
    return seed_of(number(state, "seed"), "projection", number(state, "drawn_basis"))
