"""`rounding.py` in Triton: the noise is made in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZE = 1024  # elements of a program


def round_bf16(x: Tensor, out: Tensor, low: int, high: int, offset: int) -> None:
    if x.numel():
        grid, options = (triton.cdiv(x.numel(), _SIZE),), {"SIZE": _SIZE}
        _round[grid](x, raw(out), x.numel(), low, high, offset, **options, enable_fp_fusion=False)


@triton.jit
def hashed_bits(index, low, high):
    """The 32 bits of an index (int32) that `rounding.hashed_bits` gives; low, high: of the seed."""
    x = index ^ low
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D + high
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261 + high  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def nearest_bits(x):
    """The float32 bits of the bfloat16 nearest to x, ties to even; spelt out, for Triton's
    interpreter cuts bfloat16 off."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    kept = tl.where(x != x, bits | 0x400000, bits)  # so that NaN does not become infinity
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, kept & -65536)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """float32 -> dtype, ties to even."""
    if dtype != tl.bfloat16:
        return x.to(dtype)
    return nearest_bits(x).to(tl.float32, bitcast=True).to(tl.bfloat16)


def raw(x: Tensor) -> Tensor:
    """bfloat16 as its bits: the interpreter makes the subnormal ones zero. float32 as it is."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def unpacked(x):
    """float32 of what was loaded from a `raw` tensor."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # Triton compiles one of both only if it is told so
        return x


@triton.jit
def rounded_as(x, dtype: tl.constexpr):
    """float32 rounded once to what a `raw` tensor of that element type holds, still float32."""
    if dtype == tl.int16:
        return nearest_bits(x).to(tl.float32, bitcast=True)
    else:  # Triton compiles one of both only if it is told so
        return x


@triton.jit
def packed(x, dtype: tl.constexpr):
    """The same, to be stored in it."""
    if dtype == tl.int16:
        return (nearest_bits(x) >> 16).to(tl.int16)
    else:  # Triton compiles one of both only if it is told so
        return x


@triton.jit
def stochastic(x, noise):
    """float32 -> the bits of bfloat16, rounded with 16 random bits, which NaN and infinity do not
    take."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return ((bits + tl.where(finite, noise & 0xFFFF, 0)) >> 16).to(tl.int16)


@triton.jit(do_not_specialize=["low", "high", "offset"])
def _round(x, out, count, low, high, offset, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, at < count, 0.0)
    noise = hashed_bits(at.to(tl.int32) + offset, low, high)
    tl.store(out + at, stochastic(value, noise), at < count)
