"""Root-mean-square normalisation: y = w * (x / sqrt(mean(x^2) + eps)), and its gradients.

As in Hugging Face's LLaMA the normalised row is rounded to the input's dtype before it meets the
weight; statistics and sums are float32. Float32 copies are of a slice of the rows at most, and in
Triton there are none: a program adds up the weight's gradient of its rows, in one order always.

Source: Zhang and Sennrich, arXiv:1910.07467.
"""

import torch
from torch import Tensor

from lowmem.kernels.compiled import asked_to_compile, run
from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.slices import pieces

NORM = Kernel(
    "rms_norm(Tensor x, Tensor weight, Tensor(a!) y, Tensor(b!) rstd, float eps) -> ()",
    triton="rms_norm_triton",
)
AGAIN = Kernel(
    "rms_norm_again(Tensor x, Tensor weight, Tensor rstd, Tensor(a!) y) -> ()",
    triton="rms_norm_triton",
)
BACKWARD = Kernel(
    "rms_norm_backward(Tensor(a!) grad, Tensor x, Tensor weight, Tensor rstd, Tensor(b!) partial)"
    " -> ()",
    triton="rms_norm_triton",
)

WIDEST = 8192  # features of a row that a Triton program holds; the reference takes wider ones
SLICE_ELEMENTS = 2**21  # of the backward's float32 scratch
_SUMS = 256  # of the weight's gradient in Triton, ...
_LEAST_ROWS = 16  # ... each over so many rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): the normalised rows of x (n, h) in x's dtype, and 1 / rms as float32 (n, 1)."""
    if _in_triton(NORM, x):
        y, rstd = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
        NORM(x, weight, y, rstd, eps)
        return y, rstd
    return run(_normalised, x, weight, eps)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _normalised_again(x, weight, rstd), rstd


def rms_norm_again(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The same y once more, bit for bit, from the rstd that was kept."""
    if _in_triton(AGAIN, x):
        y = torch.empty_like(x)
        AGAIN(x, weight, rstd, y)
        return y
    return run(_normalised_again, x, weight, rstd)


def _normalised_again(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.mul(x, rstd, out=torch.empty_like(x)).mul_(weight)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The weight's gradient (h) in its dtype; `grad` (n, h), that of y, becomes that of x in place.

    With z = x rstd: gw = sum_n g z, gx = rstd (g w - z mean_h(g w z)).
    """
    width = x.shape[-1]
    if _in_triton(BACKWARD, x):
        partial = rstd.new_empty(min(_SUMS, -(-len(x) // _LEAST_ROWS)), width)
        BACKWARD(grad, x, weight, rstd, partial)
        return partial.sum(0).to(weight.dtype)
    factor = weight.float()
    grad_weight = torch.zeros_like(factor)
    rows = max(1, SLICE_ELEMENTS // width)
    for start, stop in pieces(len(x), rows, x.is_meta):
        slices = grad[start:stop], x[start:stop], rstd[start:stop]
        run(_rows_backward, *slices, factor, grad_weight)
    return grad_weight.to(weight.dtype)


def _rows_backward(g: Tensor, x: Tensor, rstd: Tensor, factor: Tensor, grad_weight: Tensor) -> None:
    """g (n, h) becomes the gradient of x; what the weight (`factor`, float32) gets is added."""
    scratch = g.to(torch.float32, copy=True).mul_(x).mul_(rstd)
    grad_weight.add_(scratch.sum(0))
    shrink = torch.mv(scratch, factor).unsqueeze_(1).mul_(rstd.square()).div_(x.shape[-1])
    torch.mul(g, factor, out=scratch).mul_(rstd).addcmul_(x, shrink, value=-1)
    g.copy_(scratch)


def _in_triton(kernel: Kernel, x: Tensor) -> bool:
    return x.shape[-1] <= WIDEST and not asked_to_compile() and kernel.runs_on(x)
