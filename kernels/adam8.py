"""Adam's moments and step on blockwise 8-bit moments: read, moved and written in one pass.

    M <- b1 M + (1 - b1) g;  V <- b2 V + (1 - b2) g^2;  target += alpha scale M / (sqrt(V) + eps)

The step is made of the exact M and V; only what is kept of them are codes.

Source: Dettmers et al., arXiv:2110.02861, section 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.kernels.blockwise import block_count, code_table, dequantize, dynamic_map, quantize
from lowmem.kernels.dispatch import Kernel

ADAM8 = Kernel(
    "adam8(Tensor gradient, Tensor(a!) target, Tensor(b!) codes1, Tensor(c!) absmax1, "
    "Tensor values1, Tensor table1, Tensor(d!) codes2, Tensor(e!) absmax2, Tensor values2, "
    "Tensor table2, float alpha, float scale, float beta1, float beta2, float eps, bool lift)"
    " -> ()",
    triton="adam8_triton",
    native=True,
)


class Moment8(NamedTuple):
    """codes (k,) uint8 and absmax (blocks,) float32: flat, in place, the first begins a block."""

    codes: Tensor
    absmax: Tensor


def add_adam8_direction(
    target: Tensor,
    gradient: Tensor,
    exp_avg: Moment8,
    exp_avg_sq: Moment8,
    *,
    alpha: float,
    scale: float,
    betas: tuple[float, float],
    eps: float,
    floor_codes: bool,
) -> None:
    """target <- target + alpha * (scale * M / (sqrt(V) + eps)), and new moments; all in place.

    target, gradient: (k,) float32, contiguous. floor_codes: of V, see `blockwise.quantize`.
    """
    assert target.shape == gradient.shape == exp_avg.codes.shape == exp_avg_sq.codes.shape
    assert len(exp_avg.absmax) == len(exp_avg_sq.absmax) == block_count(len(target))
    if ADAM8.runs_on(target):
        device = str(target.device)
        constants = [(dynamic_map(s, device), code_table(s, device)) for s in (True, False)]
        ADAM8(
            *(gradient, target, *exp_avg, *constants[0], *exp_avg_sq, *constants[1]),
            *(alpha, scale, *betas, eps, floor_codes),
        )
        return
    first, second = betas
    m = dequantize(*exp_avg, signed=True)
    v = dequantize(*exp_avg_sq, signed=False)
    m.mul_(first).add_(gradient, alpha=1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    # oneMKL's sqrt may miss the last bit, which is the only one that implementations differ in.
    moved = v.sqrt().add_(eps)
    torch.div(m, moved, out=moved)
    if scale != 1.0:
        moved.mul_(scale)
    target.add_(moved, alpha=alpha)
    del moved
    for kept, value, signed in ((exp_avg, m, True), (exp_avg_sq, v, False)):
        codes, absmax = quantize(value, signed, floor_codes)
        kept.codes.copy_(codes)
        kept.absmax.copy_(absmax)
