"""`limited_scales.py` in Triton: one program looks at all channels, twice."""

import triton
import triton.language as tl
from torch import Tensor

_SIZE = 2048  # channels at a time


def limited_scales(
    over: Tensor, under: Tensor, norms: Tensor, last: Tensor, limited: Tensor, scales: Tensor,
    gamma: float,
) -> None:  # fmt: skip
    _limited[(1,)](
        over, under, norms, last, limited, scales, norms.numel(), gamma, over.numel() == 1,
        SIZE=_SIZE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _ratio(over, under):
    return tl.div_rn(over, under + 1e-8)


@triton.jit(do_not_specialize=["gamma"])
def _limited(
    over, under, norms, last, limited, scales, channels, gamma, whole: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    # Before the sum, at which all warps wait: one of them overwrites it below.
    before = tl.load(last)
    squares = tl.zeros([SIZE], tl.float32)
    for start in range(0, channels, SIZE):
        at = start + tl.arange(0, SIZE)
        norm = tl.load(norms + at, at < channels, 0.0)
        if not whole:
            exists = at < channels
            norm *= _ratio(tl.load(over + at, exists, 0.0), tl.load(under + at, exists, 0.0))
        squares += norm * norm
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    if whole:
        norm *= _ratio(tl.load(over), tl.load(under))
    excess = tl.div_rn(norm, (before + 1e-8) * gamma)
    excess = tl.where(excess < 1.0, 1.0, excess)  # NaN stays
    result = tl.div_rn(norm, excess)
    tl.store(last, tl.where(result > 0, result, before))
    tl.store(limited, (excess > 1.0).to(tl.float32))
    if whole:
        tl.store(scales, tl.div_rn(_ratio(tl.load(over), tl.load(under)), excess))
    else:
        for start in range(0, channels, SIZE):
            at = start + tl.arange(0, SIZE)
            exists = at < channels
            scale = _ratio(tl.load(over + at, exists, 0.0), tl.load(under + at, exists, 0.0))
            tl.store(scales + at, tl.div_rn(scale, tl.zeros_like(scale) + excess), exists)
