"""Between a matrix and its image in a subspace: G (m x n) <-> R (m x r) or (r x n).

    SVD(rank=128)     leading singular vectors of the gradient, on the shorter side

`down` is linear, so gradients may be summed and averaged in the subspace between two refreshes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowmem.kernels.slices import row_slices
from lowmem.optim.formats import State, tensor

Side = Literal["std", "reverse_std", "left", "right"]

Rows = Callable[[int, int], Tensor]
"""rows(start, stop): those rows of a full-size direction; the whole of it is never in memory."""


class Projector(Protocol):
    def init(self, state: State, weight: Tensor) -> None: ...

    def refresh(self, grad: Tensor, state: State) -> None:
        """Choose the subspace anew; rewrites its own entries in place."""

    def down(self, full: Tensor, state: State) -> Tensor: ...

    def up(self, low: Tensor, state: State) -> Rows: ...


def projects_right(side: Side, shape: torch.Size) -> bool:
    """Is the basis along the second dimension (R = G q) rather than the first (R = q' G)?

    "std" takes the shorter side and, of a square, the right one; "reverse_std" the other.
    """
    if side in ("left", "right"):
        return side == "right"
    return (shape[0] >= shape[1]) == (side == "std")


@dataclass(frozen=True)
class SVD:
    """The `rank` leading singular vectors of the gradient.

    State: basis (s, r) with orthonormal columns in the weight's dtype, s the projected side;
    right = 1 if s is the second dimension. A rank above s is s.

    Source: Zhao et al. 2024, arXiv:2403.03507, section 4.2.
    """

    rank: int
    side: Side = "std"

    def init(self, state: State, weight: Tensor) -> None:
        right = projects_right(self.side, weight.shape)
        side = weight.shape[1] if right else weight.shape[0]
        state["right"] = int(right)
        state["basis"] = torch.zeros(
            side, min(self.rank, side), dtype=weight.dtype, device=weight.device
        )

    def refresh(self, grad: Tensor, state: State) -> None:
        old = tensor(state, "basis")
        new, usable = leading_singular_vectors(grad, bool(state["right"]), old.shape[1])
        # Moments survive a refresh, and a flipped vector would turn them around.
        signs = (new * old).sum(dim=0).sign()
        new.mul_(torch.where(signs == 0, 1.0, signs))
        # A gradient with NaN or inf keeps the old basis, decided on the device.
        torch.where(usable, new.to(old.dtype), old, out=old)

    def down(self, full: Tensor, state: State) -> Tensor:
        basis = tensor(state, "basis")
        full = full.to(basis.dtype)
        return full @ basis if state["right"] else basis.T @ full

    def up(self, low: Tensor, state: State) -> Rows:
        basis = tensor(state, "basis")
        low = low.to(basis.dtype)
        if state["right"]:
            return lambda start, stop: low[start:stop] @ basis.T
        return lambda start, stop: basis[start:stop] @ low


def leading_singular_vectors(grad: Tensor, right: bool, rank: int) -> tuple[Tensor, Tensor]:
    """(vectors, usable): leading right or left singular vectors of grad, (s, rank), float64.

    They are the eigenvectors of the s x s Gram matrix. It is summed in float64, because squaring
    the singular values halves the digits of the small ones; this is exact to float32, faster than
    an SVD and needs no copy of the whole gradient. Each vector's largest entry is positive.
    usable: false (0-dim) where grad holds NaN or infinity; the vectors are then meaningless.
    """
    long = grad if right else grad.T
    side = long.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=grad.device)
    for start, stop in row_slices(long):
        rows = long[start:stop].double()
        gram.addmm_(rows.T, rows)
    usable = gram.isfinite().all()
    vectors = torch.linalg.eigh(torch.nan_to_num_(gram, 0.0, 0.0, 0.0)).eigenvectors
    leading = vectors[:, -rank:].flip(1)
    largest = leading.gather(0, leading.abs().argmax(dim=0, keepdim=True))
    return leading.mul_(torch.where(largest < 0, -1.0, 1.0)), usable
