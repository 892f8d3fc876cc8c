"""Newton-Schulz orthogonalisation: U S V' -> about U V', by matrix products alone.

    X <- X / divisor;   five times   A = X X',  X <- a X + (b A + c A^2) X

The coefficients make small singular values grow fastest; in return the results lie in about
[0.7, 1.2] instead of at 1. The polynomial is on the shorter side. In bfloat16 two arrangements of
the same products differ by about 1e-2 of an element, so comparisons need float32.

Two of the three products are symmetric, and cuBLAS makes both halves of them. The kernel makes one:
of a square matrix two thirds of the operations remain, of one of 4096 x 11008 71 %.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon (coefficients); Bernstein & Newhouse,
arXiv:2409.20325, appendix A.
"""

from typing import Literal

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel

SYMMETRIC = Kernel(
    "symmetric_product(Tensor x, Tensor? added, Tensor(a!) out, bool turned, float alpha, "
    "float beta) -> ()",
    triton="newton_schulz_triton",
)
LEAST_SIDE = 2048  # 136 tiles: fewer leave multiprocessors of a large card idle, and cuBLAS wins

Precision = Literal["bf16", "fp32"]

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def newton_schulz(x: Tensor, divisor: Tensor) -> Tensor:
    """Orthogonalise a matrix in its own dtype (float32 or bfloat16).

    x: (m, n), consumed. divisor: 0-dim, at least x's largest singular value, for example its
    Frobenius norm. Returns (m, n), contiguous. Two matrices of x's size live at a time.
    """
    tall = x.shape[0] > x.shape[1]
    x = x.div_(divisor)
    # float32 is no work for tensor cores, and half of it in Triton hardly faster than all of it.
    half = x.dtype == torch.bfloat16 and min(x.shape) >= LEAST_SIDE and SYMMETRIC.runs_on(x)
    for _ in range(_ITERATIONS):
        if half:
            gram = symmetric_product(x, turned=tall)
            polynomial = symmetric_product(gram, gram, alpha=_C, beta=_B)
        else:
            gram = x.T @ x if tall else x @ x.T
            polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        first, second = (x, polynomial) if tall else (polynomial, x)
        x = torch.addmm(x, first, second, beta=_A)
    return x


def symmetric_product(
    x: Tensor,
    added: Tensor | None = None,
    *,
    turned: bool = False,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """beta * added + alpha * x x', or x' x; added: symmetric, of the result's shape."""
    left = x.T if turned else x
    if SYMMETRIC.runs_on(x):
        out = x.new_empty(len(left), len(left))
        SYMMETRIC(x.contiguous(), added, out, turned, alpha, beta)
        return out
    if added is None:
        return (left @ left.T).mul_(alpha)
    return torch.addmm(added, left, left.T, beta=beta, alpha=alpha)
