"""A subspace on both sides of a matrix: R = A' G B (r x r), and back with A R B'.

    TwoSided(rank=128)     A, B: the leading left and right singular vectors of the gradient

Only the shorter side is decomposed; the vectors of the other are the image of its vectors under
the gradient, so no square matrix of the longer side appears.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.naming import seed_of
from lowmem.optim.bases import Basis, Solver, leading_basis
from lowmem.optim.formats import State, number, tensor
from lowmem.optim.place import Place
from lowmem.optim.projectors import (
    aligned,
    lift_back,
    project,
    projects_right,
    rank_of,
    squared_norm,
)
from lowmem.optim.weights import Step


def orthonormal(product: Tensor) -> Basis:
    """(Q-factor of the reduced QR in float32, whether all of it is finite).

    Householder's QR: columns without content become arbitrary ones, not NaN.
    """
    basis = torch.linalg.qr(product.float()).Q
    return basis, basis.isfinite().all()


def image(grad: Tensor, basis: Tensor, right: bool) -> Basis:
    """Orthonormal basis of what grad (m, n) makes of `basis`: on the left side if that is right.

    The image of singular vectors is the singular vectors of the other side, up to sign.
    """
    return orthonormal(project(grad, basis, right) if right else project(grad, basis, right).T)


def basis_of_side(grad: Tensor, right: bool, rank: int, solver: Solver, seed: int) -> Basis:
    """The `rank` leading singular vectors of one side, chosen for the first time.

    An exact solver works on the shorter side whichever is asked for.
    """
    short = projects_right("std", grad.shape)
    if right == short or solver == "iteration":
        basis, usable = leading_basis(grad, right, rank, solver, None, seed)
        return basis.float(), usable
    basis, usable = leading_basis(grad, short, rank, solver, None, seed)
    other, fine = image(grad, basis.float(), short)
    return other, usable & fine


@dataclass(frozen=True)
class TwoSided:
    """The leading singular vectors of the gradient, of both sides.

    rank: a number or a fraction of the shorter side. State: left (m, r) and right (n, r) with
    orthonormal columns in the weight's dtype; for the log, of the last refresh: energy
    |R|^2 / |G|^2, overlap |B_new' B_old|^2 / r of the right side; kept_bases: how many bases
    stayed because a refresh failed.

    Source: Das 2024 (Natural GaLore), arXiv:2410.16029, released code.
    """

    rank: int | float
    solver: Solver = "iteration"

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        rank = rank_of(self.rank, min(weight.shape))
        for key, side in zip(("left.basis", "right.basis"), weight.shape, strict=True):
            state[key] = torch.zeros(side, rank, dtype=weight.dtype, device=weight.device)
        for key in ("log.energy", "log.overlap", "log.kept_bases"):
            state[key] = torch.zeros((), device=weight.device)

    def refresh(self, grad: Tensor, state: State) -> None:
        old = {False: tensor(state, "left.basis"), True: tensor(state, "right.basis")}
        short = projects_right("std", grad.shape)
        first = number(state, "step") == 0
        basis, usable = leading_basis(
            grad,
            short,
            old[short].shape[1],
            self.solver,
            None if first else old[short],
            seed_of(number(state, "seed"), "basis"),
        )
        other, fine = image(grad, basis.float(), short)
        usable = usable & fine
        new = {short: basis, not short: other}
        for right, kept in old.items():
            chosen = aligned(new[right], usable, kept, state).to(kept.dtype)
            torch.where(usable, chosen, kept, out=kept)
        energy = squared_norm(self.down(grad, state)) / squared_norm(grad)
        tensor(state, "log.energy").copy_(energy)

    def bases(self, state: State) -> list[tuple[Tensor, bool]]:
        """Both bases, and whether each is the right one."""
        return [(tensor(state, "left.basis"), False), (tensor(state, "right.basis"), True)]

    def basis(self, state: State) -> Tensor:
        """The left one."""
        return tensor(state, "left.basis")

    def down(self, full: Tensor, state: State) -> Tensor:
        left, right = tensor(state, "left.basis"), tensor(state, "right.basis")
        if full.shape[0] >= full.shape[1]:  # the smaller product second
            return project(project(full, left, right=False), right, right=True)
        return project(project(full, right, right=True), left, right=False)

    def up(self, low: Tensor, state: State) -> Step:
        left, right = tensor(state, "left.basis"), tensor(state, "right.basis")
        low = low.to(left.dtype)
        if left.shape[0] <= right.shape[0]:  # the smaller of A R and R B'
            return lift_back(left @ low, right, right=True)
        return lift_back(low @ right.T, left, right=False)
