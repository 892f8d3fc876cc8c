"""Orthonormal bases of a gradient's leading subspace, by three solvers.

    iteration   one step of subspace iteration from the old basis, orthonormalised by CholeskyQR:
                two thin products, in bfloat16 where the device has it, since they only have to
                span the subspace; 40 times faster than an SVD
    eigh        eigenvectors of the Gram matrix in float64: exact
    svd         thin SVD in float32, as published; for parity

Each returns (vectors, usable): (s, r) and a 0-dim bool that is false where the gradient holds NaN
or infinity or the decomposition failed; the vectors are then meaningless and the caller keeps what
it had. `iteration` never waits for the device; on CUDA, eigh and svd read their status back.
"""

from typing import Literal

import torch
from torch import Tensor

from lowmem.kernels.dispatch import device_type
from lowmem.kernels.random_normal import normal
from lowmem.kernels.slices import row_slices

Solver = Literal["iteration", "eigh", "svd"]
Basis = tuple[Tensor, Tensor]

_COLD_ITERATIONS = 3  # from random vectors
_WARM_ITERATIONS = 1  # from the basis of some updates ago
_DAMPING = 3e-6  # of the largest eigenvalue: gives directions without gradient something to keep


def leading_basis(
    grad: Tensor, right: bool, rank: int, solver: Solver, old: Tensor | None, seed: int
) -> Basis:
    """The `rank` leading singular vectors of grad (m, n), or vectors that span nearly the same.

    right: of the second dimension. old: (s, rank), the basis so far; None the first time. seed: of
    the random vectors that `iteration` then starts from.
    """
    try:
        if solver == "iteration":
            return _iterated(grad, right, rank, old, seed)
        return _from_gram(grad, right, rank) if solver == "eigh" else _from_svd(grad, right, rank)
    except torch.linalg.LinAlgError:
        side = grad.shape[1] if right else grad.shape[0]
        nothing = torch.zeros(side, rank, device=grad.device)
        return nothing, torch.zeros((), dtype=torch.bool, device=grad.device)


def _from_gram(grad: Tensor, right: bool, rank: int) -> Basis:
    """Eigenvectors of the s x s Gram matrix, float64, each one's largest entry positive.

    The matrix is summed in float64, because squaring the singular values halves the digits of the
    small ones; this is exact to float32 and needs no copy of the whole gradient.
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


def _from_svd(grad: Tensor, right: bool, rank: int) -> Basis:
    usable = grad.isfinite().all()
    finite = torch.nan_to_num(grad.float(), 0.0, 0.0, 0.0)
    left_vectors, _, right_vectors = torch.linalg.svd(finite, full_matrices=rank > min(grad.shape))
    return (right_vectors.T if right else left_vectors)[:, :rank], usable


def _iterated(grad: Tensor, right: bool, rank: int, old: Tensor | None, seed: int) -> Basis:
    """Subspace iteration Q <- orthonormal(G G' Q), Saad 2011, chapter 5."""
    side = grad.shape[1] if right else grad.shape[0]
    if old is None:
        basis = normal(side * rank, seed, device=grad.device).view(side, rank)
        iterations = _COLD_ITERATIONS
    else:
        basis, iterations = old.float(), _WARM_ITERATIONS
    dtype = _product_dtype(grad)
    full = grad.to(dtype)
    usable = torch.ones((), dtype=torch.bool, device=grad.device)
    for _ in range(iterations):
        basis, fine = _orthonormal(_powered(full, basis, right))
        usable = usable & fine
    return basis, usable


def _powered(full: Tensor, basis: Tensor, right: bool) -> Tensor:
    """G G' Q, slightly damped, in float32."""
    start = basis.to(full.dtype)
    product = (full.T @ (full @ start) if right else full @ (full.T @ start)).float()
    return product.addcmul_(basis, _largest(product).mul(_DAMPING))


def _product_dtype(grad: Tensor) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware."""
    if device_type(grad) != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _largest(product: Tensor) -> Tensor:
    """About the largest eigenvalue, from the norm of the longest column, 0-dim; never zero."""
    return torch.linalg.vector_norm(product, dim=0).amax().clamp(min=1e-24)


def _orthonormal(product: Tensor) -> Basis:
    """CholeskyQR in float64: Q = Y L^-T with L L' = Y'Y.

    float64 is what makes one pass enough where early gradients have few directions (Yamamoto et
    al. 2015 need two passes in one precision).
    """
    exact = product.double()
    del product  # before the solution exists
    gram = exact.T @ exact
    scale = gram.diagonal().amax()
    factor, info = torch.linalg.cholesky_ex(torch.nan_to_num(gram / scale, 0.0, 0.0, 0.0))
    factor *= scale.sqrt()
    basis = torch.linalg.solve_triangular(factor.T, exact, upper=True, left=False)
    return basis.float(), (info == 0) & scale.isfinite()
