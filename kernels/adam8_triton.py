"""`adam8.py` in Triton: both moments are read, moved and written by one program per few blocks."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.blockwise_triton import OPTIONS, decode, encode, grid_of, places


def adam8(
    gradient: Tensor, target: Tensor,
    codes1: Tensor, absmax1: Tensor, values1: Tensor, table1: Tensor,
    codes2: Tensor, absmax2: Tensor, values2: Tensor, table2: Tensor,
    alpha: float, scale: float, beta1: float, beta2: float, eps: float, lift: bool,
) -> None:  # fmt: skip
    count = gradient.numel()
    if count:
        _adam8[grid_of(count)](
            gradient, target, codes1, absmax1, values1, table1, codes2, absmax2, values2, table2,
            alpha, scale, beta1, 1 - beta1, beta2, 1 - beta2, eps, count, lift, **OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["alpha", "scale", "eps"])
def _adam8(
    gradient, target, codes1, absmax1, values1, table1, codes2, absmax2, values2, table2,
    alpha, scale, keep1, take1, keep2, take2, eps, count, lift: tl.constexpr,
    BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    blocks, at, exists = places(count, BLOCK, PER_PROGRAM)
    there = blocks * BLOCK < count
    g = tl.load(gradient + at, exists, 0.0)
    m = decode(tl.load(codes1 + at, exists, 0), tl.load(absmax1 + blocks, there, 0.0), values1)
    v = decode(tl.load(codes2 + at, exists, 0), tl.load(absmax2 + blocks, there, 0.0), values2)
    # Fused where PyTorch's own kernels fuse, and nowhere else.
    m = tl.where(exists, tl.fma(g, tl.zeros_like(g) + take1, m * keep1), 0.0)
    v = tl.where(exists, tl.fma(g * take2, g, v * keep2), 0.0)
    moved = tl.div_rn(m, tl.sqrt_rn(v) + eps) * scale
    w = tl.load(target + at, exists, 0.0)
    tl.store(target + at, tl.fma(moved, tl.zeros_like(w) + alpha, w), exists)
    code, scale1 = encode(m, blocks, count, table1, False, BLOCK)
    tl.store(codes1 + at, code, exists)
    tl.store(absmax1 + blocks, scale1, there)
    code, scale2 = encode(v, blocks, count, table2, lift, BLOCK)
    tl.store(codes2 + at, code, exists)
    tl.store(absmax2 + blocks, scale2, there)
