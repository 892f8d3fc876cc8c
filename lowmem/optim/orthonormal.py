"""Orthonormal bases in float32 whatever the weight's dtype, for lifts that use the remainder.

    LeadingVectors(0.25)       singular vectors of the gradient; a quarter of the side
    RandomVectors(0.25)        random ones
    LeadingPairs, RandomPairs  the same on both sides: R = A' G B

G - P P'G must be small where it should be: a basis in bf16 alone would leave 0.1 % of G, and the
sign of that is a step like any other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowmem.kernels.random_normal import normal
from lowmem.kernels.slices import row_slices
from lowmem.naming import seed_of
from lowmem.optim.formats import State, number, tensor
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, Side, project, projects_right, rank_of
from lowmem.optim.two_sided import TwoSided

Sides = Side | Literal["full"]


def sides_of(side: Sides, shape: torch.Size) -> list[bool]:
    """Which sides are projected, right ones as True."""
    return [False, True] if side == "full" else [projects_right(side, shape)]


@dataclass(frozen=True)
class LeadingVectors(SVD):
    """SVD in float32; rank 0 is none.

    State: as SVD, and the number whole: 1 if nothing of any gradient is left out. As many vectors
    as a gradient has rank, on its longer side, are not the whole for the next gradient.
    """

    def allocate(self, state: State, side: int, rank: int, weight: Tensor) -> None:
        state["basis"] = torch.zeros(side, rank, device=weight.device)
        state["whole"] = int(rank == side)

    def refresh(self, grad: Tensor, state: State) -> None:
        if self.basis(state).numel():
            super().refresh(grad, state)

    def down(self, full: Tensor, state: State) -> Tensor:
        return project_exactly(full, self.basis(state), bool(state["right"]))


@dataclass(frozen=True)
class RandomVectors(LeadingVectors):
    """A random subspace, drawn anew at each refresh; it does not look at the gradient.

    State: basis (s, r) float32, kept because a QR per update would cost more than its memory;
    numbers: right, draw, whole.
    """

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        right = projects_right(self.side, weight.shape)
        side = weight.shape[int(right)]
        state["right"], state["draw"] = int(right), 0
        self.allocate(state, side, rank_of(self.rank, side), weight)

    def refresh(self, grad: Tensor, state: State) -> None:
        state["draw"] = draw = number(state, "draw") + 1
        seed = seed_of(number(state, "seed"), "basis", draw)
        draw_vectors(self.basis(state), seed)


@dataclass(frozen=True)
class LeadingPairs(TwoSided):
    """TwoSided in float32; rank 0 is none. State: as there, and the number whole."""

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        super().init(state, weight, place)
        for key in ("left.basis", "right.basis"):
            state[key] = tensor(state, key).float()
        state["whole"] = int(self.basis(state).shape[1] == max(weight.shape))

    def refresh(self, grad: Tensor, state: State) -> None:
        if self.basis(state).numel():
            super().refresh(grad, state)

    def down(self, full: Tensor, state: State) -> Tensor:
        left, right = tensor(state, "left.basis"), tensor(state, "right.basis")
        if full.shape[0] >= full.shape[1]:  # the smaller product second
            return project(project_exactly(full, left, right=False), right, right=True)
        return project(project_exactly(full, right, right=True), left, right=False)


@dataclass(frozen=True)
class RandomPairs(LeadingPairs):
    """Random vectors on both sides. State: both bases; numbers: draw, whole."""

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        super().init(state, weight, place)
        state["draw"] = 0
        for key in [key for key in state if key.startswith("log.")]:
            del state[key]

    def refresh(self, grad: Tensor, state: State) -> None:
        state["draw"] = draw = number(state, "draw") + 1
        for basis, right in self.bases(state):
            seed = seed_of(number(state, "seed"), "right" if right else "left", draw)
            draw_vectors(basis, seed)


def draw_vectors(basis: Tensor, seed: int) -> None:
    """Fill (s, r) with orthonormal columns, uniformly distributed: QR of normal numbers.

    The signs of R's diagonal go to Q: without them the result depends on the QR's habits.

    Source: Mezzadri 2007, arXiv:math-ph/0609050.
    """
    gaussian = normal(basis.numel(), seed, device=basis.device).view_as(basis)
    vectors, factor = torch.linalg.qr(gaussian)
    torch.mul(vectors, torch.where(factor.diagonal() < 0, -1.0, 1.0), out=basis)


def project_exactly(full: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R = G q (right) or q' G in the basis' dtype, without a copy of the whole gradient in it."""
    if full.dtype == basis.dtype:
        return project(full, basis, right)
    if right:
        low = basis.new_empty(full.shape[0], basis.shape[1])
        for start, stop in row_slices(full):
            low[start:stop] = full[start:stop].to(basis.dtype) @ basis
        return low
    low = basis.new_zeros(basis.shape[1], full.shape[1])
    for start, stop in row_slices(full):
        low.addmm_(basis[start:stop].T, full[start:stop].to(basis.dtype))
    return low
