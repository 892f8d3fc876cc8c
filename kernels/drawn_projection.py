"""A gradient's image on a drawn line, and the norms of its channels, in one pass over it.

    low, norms = project_on_line(gradient, seed=7, right=True)     R = G p,  |G_i| of its rows
    norms = channel_norms(gradient, right=True)                    the norms alone

A channel is a line across the side that the basis spans: a row of G where the basis is on the
right, a column where it is on the left. p has the entries that `random_normal` draws, rounded to
the gradient's dtype; the kernel draws them in registers, and they are nowhere in memory.

Of many lines every tile of G would draw the same r entries again, each a lookup in a table that no
first-level cache holds: at rank 256 far more bytes than G has. Such a P is drawn once, a few MiB,
tensor cores multiply, and the norms are a pass of their own (docs/kernels.md).
"""

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.random_normal import lookup_table, normal
from lowmem.kernels.rounding import seed_words
from lowmem.kernels.slices import row_slices

PROJECT = Kernel(
    "drawn_projection(Tensor full, Tensor table, Tensor(a!) sums, Tensor(b!) low, "
    "Tensor(c!) norms, bool right, int seed_low, int seed_high) -> ()",
    triton="drawn_projection_triton",
)
NORMS = Kernel(
    "channel_norms(Tensor full, Tensor(a!) sums, Tensor(b!) norms, bool right) -> ()",
    triton="drawn_projection_triton",
)

SEGMENT = 256  # elements of a channel that one program adds up


def in_one_pass(full: Tensor) -> bool:
    """Does a kernel read this matrix only once?"""
    return PROJECT.runs_on(full) and full.is_contiguous()


def drawn_basis(side: int, rank: int, seed: int, device: torch.device | str) -> Tensor:
    """(side, rank) float32 of N(0, 1/rank), not orthonormal."""
    return normal(side * rank, seed, device=device).mul_(rank**-0.5).view(side, rank)


def project_on_line(full: Tensor, seed: int, right: bool) -> tuple[Tensor, Tensor]:
    """(R in the dtype of `full`, `channel_norms`); full: (m, n), R: (m, 1) if right, else (1, n).

    Both implementations add in float32, in another order: before it is rounded to its dtype, R_j
    is within (s / 2^24) sum_i |G_ji p_i| of the exact sum over a side of s, and in practice within
    a few 2^-24 |G_j| |p|.
    """
    if not in_one_pass(full):
        line = drawn_basis(full.shape[int(right)], 1, seed, full.device).to(full.dtype)
        return full @ line if right else line.T @ full, channel_norms(full, right)
    norms, sums = _norms_and_sums(full, 2, right)
    low = torch.empty_like(norms, dtype=full.dtype)
    PROJECT(full, lookup_table(str(full.device)), sums, low, norms, right, *seed_words(seed))
    return low, norms


def channel_norms(full: Tensor, right: bool) -> Tensor:
    """Norms of the rows (right) or columns of (m, n), float32, of size 1 along the other axis.

    One pass; no temporary is larger than one group of rows.
    """
    if NORMS.runs_on(full) and full.is_contiguous():
        norms, sums = _norms_and_sums(full, 1, right)
        NORMS(full, sums, norms, right)
        return norms
    if right and full.dtype == torch.float32:
        return line_norms(full, 1)
    if right:
        norms = torch.empty(full.shape[0], 1, device=full.device)
        for start, stop in row_slices(full):
            norms[start:stop] = line_norms(full[start:stop], 1)
        return norms
    squares = torch.zeros(1, full.shape[1], device=full.device)
    for start, stop in row_slices(full):
        squares += full[start:stop].float().square().sum(dim=0)
    return squares.sqrt_()


def line_norms(values: Tensor, axis: int) -> Tensor:
    """Norms along an axis, which becomes 1, in float32."""
    return torch.linalg.vector_norm(values, dim=axis, keepdim=True, dtype=torch.float32)


def _norms_and_sums(full: Tensor, kinds: int, right: bool) -> tuple[Tensor, Tensor]:
    """Room for norms, and for so many sums of every segment of every channel.

    The cut depends on the shape alone: every card adds in the same order.
    """
    side, channels = full.shape[int(right)], full.shape[1 - int(right)]
    norms = torch.empty((channels, 1) if right else (1, channels), device=full.device)
    return norms, norms.new_empty(-(-side // SEGMENT), kinds, channels)
