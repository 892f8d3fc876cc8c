"""Root-mean-square normalisation: y = w * (x / sqrt(mean(x^2) + eps)), and its gradients.

As in Hugging Face's LLaMA the normalised row is rounded to the input's dtype before it meets the
weight; statistics and sums are float32. Float32 copies are of a slice of the rows at most.

Source: Zhang and Sennrich, arXiv:1910.07467.
"""

import torch
from torch import Tensor

from lowmem.kernels.slices import pieces

SLICE_ELEMENTS = 2**21  # of the backward's float32 scratch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): the normalised rows of x (n, h) in x's dtype, and 1 / rms as float32 (n, 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return rms_norm_again(x, weight, rstd), rstd


def rms_norm_again(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The same y once more, bit for bit, from the rstd that was kept."""
    return torch.mul(x, rstd, out=torch.empty_like(x)).mul_(weight)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The weight's gradient (h) in its dtype; `grad` (n, h), that of y, becomes that of x in place.

    With z = x rstd: gw = sum_n g z, gx = rstd (g w - z mean_h(g w z)).
    """
    width = x.shape[-1]
    factor = weight.float()
    grad_weight = torch.zeros_like(factor)
    rows = max(1, SLICE_ELEMENTS // width)
    for start, stop in pieces(len(x), rows, x.is_meta):
        g, part, inverse = grad[start:stop], x[start:stop], rstd[start:stop]
        scratch = g.to(torch.float32, copy=True).mul_(part).mul_(inverse)
        grad_weight.add_(scratch.sum(0))
        shrink = torch.mv(scratch, factor).unsqueeze_(1).mul_(inverse.square()).div_(width)
        torch.mul(g, factor, out=scratch).mul_(inverse).addcmul_(part, shrink, value=-1)
        g.copy_(scratch)
    return grad_weight.to(weight.dtype)
