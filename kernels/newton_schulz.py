"""Newton-Schulz orthogonalisation: U S V' -> about U V', by matrix products alone.

    X <- X / divisor;   five times   A = X X',  X <- a X + (b A + c A^2) X

The coefficients make small singular values grow fastest; in return the results lie in about
[0.7, 1.2] instead of at 1. The polynomial is on the shorter side. In bfloat16 two arrangements of
the same products differ by about 1e-2 of an element, so comparisons need float32.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon (coefficients); Bernstein & Newhouse,
arXiv:2409.20325, appendix A.
"""

from typing import Literal

import torch
from torch import Tensor

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
    for _ in range(_ITERATIONS):
        gram = x.T @ x if tall else x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        first, second = (x, polynomial) if tall else (polynomial, x)
        x = torch.addmm(x, first, second, beta=_A)
    return x
