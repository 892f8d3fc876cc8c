"""`groupwise.py` in Triton: a program works on a few whole groups, its noise in registers."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.rounding_triton import hashed_bits, nearest

_LEAST_RANGE = tl.constexpr(1e-5)  # as in groupwise.py
_ELEMENTS = 1024  # of a program


def group_quantize(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, top: int, group: int,
    stochastic: bool, low: int, high: int, offset: int, span_zero: bool,
) -> None:  # fmt: skip
    if x.numel():
        grid, shape = cut(x.numel(), group)
        _quantize[grid](
            x, codes, scales, zeros, x.numel(), low, high, offset, group, top, stochastic,
            span_zero, *shape, enable_fp_fusion=False,
        )  # fmt: skip


def group_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor, group: int) -> None:
    if codes.numel():
        grid, shape = cut(codes.numel(), group)
        _dequantize[grid](
            codes, scales, zeros, out, codes.numel(), group, *shape, enable_fp_fusion=False
        )


def cut(elements: int, group: int) -> tuple[tuple[int], tuple[int, int]]:
    """(grid, (groups of a program, the power of two that holds a group))."""
    width = triton.next_power_of_2(group)
    groups = max(1, _ELEMENTS // width)
    return (triton.cdiv(elements, groups * group),), (groups, width)


@triton.jit
def places(count, group: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(groups, elements of each, which of those exist) of this program."""
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)[None, :]
    elements = groups[:, None] * group + column
    return groups, elements, (column < group) & (elements < count)


@triton.jit
def _nearest(x):
    """To the nearest integer, ties to even, of numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode(
    value, exists, index, low, high, top: tl.constexpr, stochastic: tl.constexpr,
    span_zero: tl.constexpr,
):  # fmt: skip
    """(codes, scales, zero points), float32, of groups: the lines of `value`. index: of the noise
    (int32)."""
    least = tl.min(tl.where(exists, value, float("inf")), axis=1)
    most = tl.max(tl.where(exists, value, float("-inf")), axis=1)
    if span_zero:
        least, most = tl.minimum(least, 0.0), tl.maximum(most, 0.0)
    tops = tl.full(least.shape, top, tl.float32)
    scale = tl.div_rn(tl.maximum(most - least, _LEAST_RANGE), tops)
    none = tl.max((value != value).to(tl.int32), axis=1) > 0
    scale = tl.where(none, float("nan"), scale)
    # Clamped before they are rounded: what lies beyond is clamped in any case.
    zero = -_nearest(tl.minimum(tl.maximum(tl.div_rn(least, scale), -tops), 0.0))
    ratio = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    ratio = tl.minimum(tl.maximum(ratio, -top - 1.0), top + 1.0)
    if stochastic:
        noise = (hashed_bits(index, low, high) & 0xFFFFFF).to(tl.float32)
        below = tl.floor(ratio)
        ratio = below + (noise * 5.9604644775390625e-08 < ratio - below).to(tl.float32)
    else:
        ratio = _nearest(ratio)
    return tl.minimum(tl.maximum(ratio + zero[:, None], 0.0), top * 1.0), scale, zero


@triton.jit(do_not_specialize=["low", "high", "offset"])
def _quantize(
    x, codes, scales, zeros, count, low, high, offset, group: tl.constexpr, top: tl.constexpr,
    stochastic: tl.constexpr, span_zero: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    groups, at, exists = places(count, group, GROUPS, WIDTH)
    index = at.to(tl.int32) + offset
    code, scale, zero = encode(
        tl.load(x + at, exists, 0.0), exists, index, low, high, top, stochastic, span_zero
    )
    tl.store(codes + at, code.to(tl.uint8), exists)
    there = groups * group < count
    tl.store(scales + groups, scale, there)
    tl.store(zeros + groups, zero.to(zeros.dtype.element_ty), there)


@triton.jit
def decode(codes, scales, zeros, groups, at, exists, there):
    """float32 values of groups, a line each."""
    scale = tl.load(scales + groups, there, 0.0)
    zero = tl.load(zeros + groups, there, 0).to(tl.float32)
    code = tl.load(codes + at, exists, 0).to(tl.float32)
    return (code - zero[:, None]) * scale[:, None]


@triton.jit
def _dequantize(
    codes, scales, zeros, out, count, group: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    groups, at, exists = places(count, group, GROUPS, WIDTH)
    value = decode(codes, scales, zeros, groups, at, exists, groups * group < count)
    tl.store(out + at, nearest(value, out.dtype.element_ty), exists)
