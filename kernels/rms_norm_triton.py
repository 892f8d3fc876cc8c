"""`rms_norm.py` in Triton: a program holds whole rows in registers and reads each once."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.rounding_triton import packed, raw, rounded_as, unpacked

_ELEMENTS = 1024  # of a program, where a row has fewer


def rms_norm(x: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, eps: float) -> None:
    _normalise(x, weight, y, rstd, eps, kept=False)


def rms_norm_again(x: Tensor, weight: Tensor, rstd: Tensor, y: Tensor) -> None:
    _normalise(x, weight, y, rstd, 0.0, kept=True)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, partial: Tensor
) -> None:
    if x.numel():
        (rows, width), programs = x.shape, len(partial)
        tile, warps = _tile(width)
        _backward[(programs,)](
            raw(grad), raw(x), raw(weight), rstd, partial, rows, triton.cdiv(rows, programs),
            width, *tile, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _normalise(
    x: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, eps: float, *, kept: bool
) -> None:
    if x.numel():
        rows, width = x.shape
        tile, warps = _tile(width)
        _forward[(triton.cdiv(rows, tile[0]),)](
            raw(x), raw(weight), raw(y), rstd, rows, eps, width, kept, *tile,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _tile(width: int) -> tuple[tuple[int, int], int]:
    """((rows at a time, the power of two that holds a row), warps)."""
    wide = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // wide)
    return (rows, wide), min(16, max(4, rows * wide // 512))


@triton.jit
def _forward(
    x, weight, y, rstd, count, eps, width: tl.constexpr, kept: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, there = tl.arange(0, WIDTH), rows < count
    at = rows[:, None] * width + columns[None, :]
    exists = there[:, None] & (columns < width)[None, :]
    value = unpacked(tl.load(x + at, exists, 0))
    if kept:
        inverse = tl.load(rstd + rows, there, 0.0)
    else:
        total = tl.sum(value * value, axis=1)
        ones = tl.full(total.shape, 1.0, tl.float32)
        inverse = tl.div_rn(ones, tl.sqrt_rn(tl.div_rn(total, ones * width) + eps))
        tl.store(rstd + rows, inverse, there)
    factor = unpacked(tl.load(weight + columns, columns < width, 0))
    normal = rounded_as(value * inverse[:, None], y.dtype.element_ty)
    tl.store(y + at, packed(normal * factor[None, :], y.dtype.element_ty), exists)


@triton.jit
def _backward(
    grad, x, weight, rstd, partial, count, per_program, width: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = columns < width
    factor = unpacked(tl.load(weight + columns, inside, 0))[None, :]
    end = tl.minimum((program + 1) * per_program, count)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, per_program, ROWS):
        rows = program * per_program + first + tl.arange(0, ROWS)
        at = rows[:, None] * width + columns[None, :]
        exists = (rows < end)[:, None] & inside[None, :]
        g = unpacked(tl.load(grad + at, exists, 0))
        value = unpacked(tl.load(x + at, exists, 0))
        inverse = tl.load(rstd + rows, rows < end, 0.0)[:, None]
        turned = g * value * inverse
        summed += turned
        dot = tl.sum(turned * factor, axis=1)[:, None] * (inverse * inverse)
        shrink = tl.div_rn(dot, tl.zeros_like(dot) + width)
        made = tl.fma(-value, tl.broadcast_to(shrink, value.shape), g * factor * inverse)
        tl.store(grad + at, packed(made, grad.dtype.element_ty), exists)
    tl.store(partial + program * width + columns, tl.sum(summed, axis=0), inside)
