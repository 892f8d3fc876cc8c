"""Between a matrix and its image in a subspace: G (m x n) <-> R (m x r) or (r x n).

    SVD(rank=128)             leading singular vectors of the gradient, on the shorter side
    QuantizedSVD(rank=128)    the same, kept in 4-bit codes

`down` is linear, so gradients may be summed and averaged in the subspace between two refreshes.
Projectors that draw at random stand in `random_projectors.py`, float32 ones in `orthonormal.py`,
those that choose lines or entries in `coordinates.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem.kernels.groupwise import dequantize, group_count, pack, quantize, unpack
from lowmem.kernels.slices import row_slices
from lowmem.kernels.unproject_write import Product
from lowmem.naming import seed_of
from lowmem.optim.bases import Solver, leading_basis
from lowmem.optim.formats import State, number, tensor
from lowmem.optim.place import Place
from lowmem.optim.weights import Step

Side = Literal["std", "reverse_std", "left", "right"]
BasisBits = Literal[4, 8, 32]
Similarity = Literal["captured", "first"]


class Projector(Protocol):
    def init(self, state: State, weight: Tensor, place: Place) -> None: ...

    def refresh(self, grad: Tensor, state: State) -> None:
        """Choose the subspace anew; rewrites its own entries in place."""

    def basis(self, state: State) -> Tensor:
        """(s, r), columns orthonormal where the subspace has such a basis."""

    def down(self, full: Tensor, state: State) -> Tensor: ...

    def up(self, low: Tensor, state: State) -> Step:
        """A step that adds the rows of `low` mapped back to full size."""


@runtime_checkable
class Norming(Protocol):
    """What else a projector has that can note the norms of channels as it reads the gradient."""

    def down_with_norms(self, full: Tensor, state: State) -> tuple[Tensor, Tensor] | None:
        """(`down`, `channel_norms` across the basis' side); None where that takes two passes."""


def projects_right(side: Side, shape: torch.Size) -> bool:
    """Is the basis along the second dimension (R = G q) rather than the first (R = q' G)?

    "std" takes the shorter side and, of a square, the right one; "reverse_std" the other.
    """
    if side in ("left", "right"):
        return side == "right"
    return (shape[0] >= shape[1]) == (side == "std")


def rank_of(rank: int | float, side: int) -> int:
    """A rank above the side is the side; a fraction is one of the side, rounded half to even."""
    return round(rank * side) if isinstance(rank, float) else min(rank, side)


def project(full: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R = G q (right) or q' G, in the basis' dtype."""
    full = full.to(basis.dtype)
    return full @ basis if right else basis.T @ full


def lift_back(low: Tensor, basis: Tensor, right: bool) -> Product:
    """A step of R q' (right) or q R."""
    low = low.to(basis.dtype)
    return Product(low, basis.T) if right else Product(basis, low)


@dataclass(frozen=True)
class SVD:
    """The leading singular vectors of the gradient.

    rank: a number or a fraction of the projected side s. State: basis (s, r) with orthonormal
    columns in the weight's dtype; right = 1 if s is the second dimension; for the log, of the last
    refresh: energy |R|^2 / |G|^2, overlap |P_new' P_old|^2 / r; kept_bases: refreshes that failed.

    Source: Zhao et al. 2024, arXiv:2403.03507, section 4.2.
    """

    rank: int | float
    side: Side = "std"
    solver: Solver = "iteration"

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        right = projects_right(self.side, weight.shape)
        side = weight.shape[1] if right else weight.shape[0]
        state["right"] = int(right)
        # A matrix has no more singular vectors than its shorter side, whichever is projected.
        rank = min(rank_of(self.rank, side), *weight.shape)
        self.allocate(state, side, rank, weight)
        for key in ("log.energy", "log.overlap", "log.kept_bases"):
            state[key] = torch.zeros((), device=weight.device)

    def allocate(self, state: State, side: int, rank: int, weight: Tensor) -> None:
        """Make room for the basis, filled with zero."""
        state["basis"] = torch.zeros(side, rank, dtype=weight.dtype, device=weight.device)

    def refresh(self, grad: Tensor, state: State) -> None:
        old, right = self.basis(state), bool(state["right"])
        first = number(state, "step") == 0
        new, usable = leading_basis(
            grad,
            right,
            old.shape[1],
            self.solver,
            None if first else old,
            seed_of(number(state, "seed"), "basis"),
        )
        self.store(state, aligned(new, usable, old, state), usable)
        tensor(state, "log.energy").copy_(self.energy(grad, state))

    def energy(self, grad: Tensor, state: State) -> Tensor:
        """|R|^2 / |G|^2, 0-dim."""
        return squared_norm(self.down(grad, state)) / squared_norm(grad)

    def store(self, state: State, new: Tensor, usable: Tensor) -> None:
        """Put `new` (float32) in place of the basis if it is usable."""
        old = tensor(state, "basis")
        torch.where(usable, new.to(old.dtype), old, out=old)

    def basis(self, state: State) -> Tensor:
        return tensor(state, "basis")

    def down(self, full: Tensor, state: State) -> Tensor:
        return project(full, self.basis(state), bool(state["right"]))

    def up(self, low: Tensor, state: State) -> Step:
        return lift_back(low, self.basis(state), bool(state["right"]))


def squared_norm(full: Tensor) -> Tensor:
    """|G|^2, summed in float32, 0-dim; of a group of rows at a time."""
    total = torch.zeros((), device=full.device)
    for start, stop in row_slices(full):
        total += full[start:stop].to(torch.float32, copy=True).square_().sum()
    return total


def aligned(new: Tensor, usable: Tensor, old: Tensor, state: State) -> Tensor:
    """`new` in float32 with the signs of `old`; notes for the log how the two compare."""
    new = new.float()
    # Moments survive a refresh, and a flipped vector would turn them around.
    signs = (new * old).sum(dim=0).sign()
    new.mul_(torch.where(signs == 0, 1.0, signs))
    overlap = torch.linalg.matrix_norm(new.T @ old.to(new.dtype)).square() / max(1, old.shape[1])
    tensor(state, "log.overlap").copy_(torch.where(usable, overlap, 1.0))
    tensor(state, "log.kept_bases").add_(usable.logical_not())
    return new


@dataclass(frozen=True)
class QuantizedSVD(SVD):
    """SVD with the basis in codes: 4 bits, 8, or 32 for float32 without codes.

    group: elements that share a scale, row by row of P as published: (r, s) on the right, (s, r)
    on the left. span_zero: see `kernels/groupwise.py`. similarity of an old and a new basis, as
    `Lazy` asks for it, 1 for the same and 0 where a refresh failed:
        captured  sqrt((e(P_old) - r/s) / (e(P_new) - r/s)),  e(P) = |P'G|^2 / |G|^2
        first     the cosine of the two first vectors; signs are aligned, so it is not negative
    e is r/s for random vectors, and at rank 1 both are the cosine. Cosines suit exact solvers
    only: `iteration` stays near the old basis, most of all where the gradient is mere noise.

    State instead of basis: basis.codes (two 4-bit codes per byte), basis.scales, basis.zeros
    (float32, one per group); for "first" also the first vector, float32; log.similarity.

    Source: Zhang et al. 2024 (Q-GaLore), arXiv:2407.08296, sections 3.2 and 3.3.
    """

    bits: BasisBits = 4
    group: int = 256
    similarity: Similarity = "captured"
    span_zero: bool = True

    def allocate(self, state: State, side: int, rank: int, weight: Tensor) -> None:
        new = partial(torch.zeros, device=weight.device)
        state["side"], state["rank"] = side, rank
        if self.bits == 32:
            state["basis"] = new(side, rank)
        else:
            state["basis.codes"] = new(-(-side * rank * self.bits // 8), dtype=torch.uint8)
            for key in ("basis.scales", "basis.zeros"):
                state[key] = new(group_count(side * rank, self.group))
        if self.similarity == "first":
            state["first"] = new(side)
        state["log.similarity"] = new(())

    def refresh(self, grad: Tensor, state: State) -> None:
        before, chance = self.energy(grad, state), number(state, "rank") / number(state, "side")
        super().refresh(grad, state)
        if self.similarity == "captured" and chance < 1.0:
            old, new = ((e - chance).clamp_(min=0.0) for e in (before, tensor(state, "log.energy")))
            share = (old / new).clamp_(max=1.0).sqrt_()
            tensor(state, "log.similarity").mul_(share).nan_to_num_(0.0)

    def energy(self, grad: Tensor, state: State) -> Tensor:
        """Of vectors of mean square length 1, which those of the codes are not quite."""
        return super().energy(grad, state) / self.basis(state).square().sum(dim=0).mean()

    def store(self, state: State, new: Tensor, usable: Tensor) -> None:
        similarity = torch.ones((), device=new.device)
        if self.similarity == "first":
            first = tensor(state, "first")
            similarity = torch.cosine_similarity(first, new[:, 0], dim=0)
            torch.where(usable, new[:, 0], first, out=first)
        tensor(state, "log.similarity").copy_(torch.where(usable, similarity, 0.0))
        if self.bits == 32:
            return super().store(state, new, usable)
        published = (new.T if state["right"] else new).contiguous()
        codes, scales, zeros = quantize(published, self.bits, self.group, None, self.span_zero)
        packed = pack(codes) if self.bits == 4 else codes.view(-1)
        for what, value in (("codes", packed), ("scales", scales), ("zeros", zeros)):
            old = tensor(state, f"basis.{what}")
            torch.where(usable, value, old, out=old)

    def basis(self, state: State) -> Tensor:
        """(s, r) float32."""
        if self.bits == 32:
            return tensor(state, "basis")
        side, rank = number(state, "side"), number(state, "rank")
        scales, zeros = tensor(state, "basis.scales"), tensor(state, "basis.zeros")
        values = dequantize(self.codes(state), scales, zeros, self.group)
        return values.view(rank, side).T if state["right"] else values.view(side, rank)

    def codes(self, state: State) -> Tensor:
        """(s r,), one code per element."""
        codes = tensor(state, "basis.codes")
        if self.bits == 8:
            return codes
        return unpack(codes, number(state, "side") * number(state, "rank"))

    def down(self, full: Tensor, state: State) -> Tensor:
        return project(full, self.basis(state).to(full.dtype), bool(state["right"]))
