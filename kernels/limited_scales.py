"""Scales of a gradient's channels, and the limit to the growth of what they make of it.

    s_j = a_j / (b_j + 1e-8),   or one s from a and b of the whole
    norm = |(s_j |G_j|)_j|;   f = max(norm / ((z + 1e-8) gamma), 1);   s <- s / f;   z <- norm / f

z is kept where norm / f is zero or not a number. One launch; in plain PyTorch some twenty.

Source: Chen et al. 2024 (Fira), arXiv:2410.01623 (norm-growth limiter); Zhu et al. 2024 (APOLLO),
arXiv:2412.05270, Algorithm 1.
"""

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel

SCALES = Kernel(
    "limited_scales(Tensor over, Tensor under, Tensor norms, Tensor(a!) last, Tensor(b!) limited, "
    "Tensor(c!) scales, float gamma) -> ()",
    triton="limited_scales_triton",
)


def limited_scales(
    over: Tensor, under: Tensor, norms: Tensor, last: Tensor, limited: Tensor, gamma: float
) -> Tensor:
    """s, limited, of the shape of `over`; all float32.

    over, under: a and b, a number for every channel or for the whole; consumed. norms: |G_j| of
    every channel. last: z, limited: 1 where the limiter acted; both 0-dim and rewritten.
    """
    if SCALES.runs_on(over):
        scales = torch.empty_like(over)
        SCALES(over, under, norms, last, limited, scales, gamma)
        return scales
    scales = over.div_(under.add_(1e-8))
    if scales.numel() == 1:
        norm = torch.linalg.vector_norm(norms) * scales.view(())
    else:
        norm = torch.linalg.vector_norm(norms.mul_(scales))
    return scales.mul_(shrinking(norm, last, limited, gamma))


def shrinking(norm: Tensor, last: Tensor, limited: Tensor, gamma: float) -> Tensor:
    """1 / f for a step of that norm, 0-dim; notes the norm that results, and whether f > 1."""
    excess = (norm / (last + 1e-8).mul_(gamma)).clamp_(min=1.0)
    result = norm / excess
    torch.where(result > 0, result, last, out=last)  # infinity / infinity is not > 0
    limited.copy_(excess > 1)
    return excess.reciprocal_()
