"""`unproject_write.py` in Triton: a program multiplies a tile out and writes it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.dispatch import interpreted
from lowmem.kernels.groupwise_triton import decode, encode
from lowmem.kernels.rounding_triton import hashed_bits, raw, stochastic, unpacked
from lowmem.kernels.unproject_write import TILE

_TOP = tl.constexpr(255)  # codes of 8 bits
_SWIZZLE = tl.constexpr(8)  # rows of tiles that are worked on together, for the cache's sake


def unproject_write(
    first: Tensor, second: Tensor, across: bool, rest: Tensor | None, factors: Tensor | None,
    weight: Tensor, alpha: float, share: float, decay: float, decay_first: bool,
    low: int, high: int, offset: int,
) -> None:  # fmt: skip
    if weight.numel():
        exact = weight.dtype == torch.float32
        _write[_grid(weight)](
            first, second, _bits(rest), factors, raw(weight), *weight.shape, first.shape[1],
            alpha, share, decay, low, high, offset, across, _by_rows(factors, weight),
            _when(decay, decay_first), **_options(exact),
        )  # fmt: skip


def unproject_write_codes(
    first: Tensor, second: Tensor, across: bool, rest: Tensor | None, factors: Tensor | None,
    codes: Tensor, scales: Tensor, zeros: Tensor, alpha: float, share: float, decay: float,
    decay_first: bool, low: int, high: int, offset: int, group: int, stochastic: bool,
    span_zero: bool,
) -> None:  # fmt: skip
    if codes.numel():
        _write_codes[_grid(codes)](
            first, second, _bits(rest), factors, codes, scales, zeros, *codes.shape,
            first.shape[1], alpha, share, decay, low, high, offset, across,
            _by_rows(factors, codes), _when(decay, decay_first), group, stochastic, span_zero,
            **_options(False),
        )  # fmt: skip


def _grid(weight: Tensor) -> tuple[int]:
    return (triton.cdiv(weight.shape[0], TILE) * triton.cdiv(weight.shape[1], TILE),)


def _bits(rest: Tensor | None) -> Tensor | None:
    return None if rest is None else raw(rest)


def _by_rows(factors: Tensor | None, weight: Tensor) -> bool:
    return factors is not None and factors.shape == (len(weight), 1)


def _when(decay: float, first: bool) -> int:
    """0: no decay, 1: before the step, 2: after it."""
    return 0 if not decay else 1 if first else 2


def _options(exact: bool) -> dict[str, Any]:
    """exact: float32 factors are not rounded. The interpreter cannot multiply bfloat16."""
    dtype = tl.float32 if exact or interpreted() else tl.bfloat16
    shape = {"SIDE": TILE, "DEPTH": 16 if exact else 32, "num_warps": 8}
    return {"DTYPE": dtype, "enable_fp_fusion": False, "num_stages": 2 if exact else 4, **shape}


@triton.jit
def _product(
    first, second, height, width, rank, across: tl.constexpr, DTYPE: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(first row, first column, upper half, lower half) of this program's tile of first @ second,
    float32. What is done with a tile takes more registers than a thread has: it is done twice."""
    wide, number = tl.cdiv(width, SIDE), tl.program_id(0)
    i, j = tl.swizzle2d(number // wide, number % wide, tl.cdiv(height, SIDE), wide, _SWIZZLE)
    top, left = i * SIDE, j * SIDE
    rows, columns = top + tl.arange(0, SIDE), left + tl.arange(0, SIDE)
    inner = tl.arange(0, DEPTH)
    a = first + rows.to(tl.int64)[:, None] * rank + inner[None, :]
    if across:
        b = second + columns.to(tl.int64)[None, :] * rank + inner[:, None]
        stride = DEPTH
    else:
        b = second + inner.to(tl.int64)[:, None] * width + columns[None, :]
        stride = DEPTH * width
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for done in range(0, rank, DEPTH):
        x = tl.load(a, (rows < height)[:, None] & (inner < rank - done)[None, :], 0.0)
        y = tl.load(b, (inner < rank - done)[:, None] & (columns < width)[None, :], 0.0)
        total = tl.dot(x.to(DTYPE), y.to(DTYPE), total, input_precision="ieee")
        a += DEPTH
        b += stride
    halves = tl.permute(tl.reshape(total, (2, SIDE // 2, SIDE)), (1, 2, 0))
    upper, lower = tl.split(halves)
    return top, left, upper, lower


@triton.jit
def _moved(
    value, product, rest, factors, at, row, column, exists, alpha, share, decay,
    by_rows: tl.constexpr, when: tl.constexpr,
):  # fmt: skip
    """Decay and step of float32 weights, fused where PyTorch's own kernels fuse. rest, factors:
    where the part begins; row, column: of `at`, to be broadcast."""
    if when == 1:
        value = tl.fma(value, tl.zeros_like(value) - decay, value)
    value = tl.fma(product, tl.zeros_like(value) + alpha, value)
    if rest is not None:
        line = row if by_rows else column
        factor = tl.load(factors + tl.broadcast_to(line, value.shape), exists, 0.0)
        shares = tl.zeros_like(value) + share
        value = tl.fma(shares * unpacked(tl.load(rest + at, exists, 0)), factor, value)
    if when == 2:
        value = tl.fma(value, tl.zeros_like(value) - decay, value)
    return value


@triton.jit
def _float_part(
    product, rest, factors, weight, top, left, height, width, alpha, share, decay, low, high,
    offset, by_rows: tl.constexpr, when: tl.constexpr,
):  # fmt: skip
    """Write the part of a float weight that begins at (top, left)."""
    begin = top.to(tl.int64) * width + left
    row, column = tl.arange(0, product.shape[0])[:, None], tl.arange(0, product.shape[1])[None, :]
    at, exists = row * width + column, (row < height - top) & (column < width - left)
    if rest is not None:
        rest += begin
        factors += top if by_rows else left
    value = unpacked(tl.load(weight + begin + at, exists, 0))
    value = _moved(
        value, product, rest, factors, at, row, column, exists, alpha, share, decay, by_rows, when
    )
    if weight.dtype.element_ty == tl.int16:
        noise = hashed_bits(at + (begin.to(tl.int32) + offset), low, high)
        tl.store(weight + begin + at, stochastic(value, noise), exists)
    else:
        tl.store(weight + begin + at, value, exists)


@triton.jit(do_not_specialize=["alpha", "share", "decay", "low", "high", "offset"])
def _write(
    first, second, rest, factors, weight, height, width, rank, alpha, share, decay, low, high,
    offset, across: tl.constexpr, by_rows: tl.constexpr, when: tl.constexpr, DTYPE: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    top, left, upper, lower = _product(
        first, second, height, width, rank, across, DTYPE, SIDE, DEPTH
    )
    _float_part(
        upper, rest, factors, weight, top, left, height, width, alpha, share, decay, low, high,
        offset, by_rows, when,
    )  # fmt: skip
    _float_part(
        lower, rest, factors, weight, top + SIDE // 2, left, height, width, alpha, share, decay,
        low, high, offset, by_rows, when,
    )  # fmt: skip


@triton.jit
def _code_part(
    product, rest, factors, codes, scales, zeros, top, left, height, width, alpha, share, decay,
    low, high, offset, by_rows: tl.constexpr, when: tl.constexpr, group: tl.constexpr,
    rounds: tl.constexpr, span_zero: tl.constexpr,
):  # fmt: skip
    """Write the part of a weight of codes that begins at (top, left), a group per line."""
    begin = top.to(tl.int64) * width + left
    per_row: tl.constexpr = product.shape[1] // group
    line = tl.arange(0, product.shape[0] * per_row)
    row, column = line // per_row, line % per_row * group
    there = (row < height - top) & (column < width - left)
    groups = begin // group + row * (width // group) + column // group
    exists = tl.broadcast_to(there[:, None], (product.shape[0] * per_row, group))
    row, column = row[:, None], column[:, None] + tl.arange(0, group)[None, :]
    at = row * width + column
    if rest is not None:
        rest += begin
        factors += top if by_rows else left
    value = decode(codes + begin, scales, zeros, groups, at, exists, there)
    value = _moved(
        value, tl.reshape(product, at.shape), rest, factors, at, row, column, exists, alpha, share,
        decay, by_rows, when,
    )  # fmt: skip
    code, scale, zero = encode(
        value, exists, at + (begin.to(tl.int32) + offset), low, high, _TOP, rounds, span_zero
    )
    tl.store(codes + begin + at, code.to(tl.uint8), exists)
    tl.store(scales + groups, scale, there)
    tl.store(zeros + groups, zero.to(zeros.dtype.element_ty), there)


@triton.jit(do_not_specialize=["alpha", "share", "decay", "low", "high", "offset"])
def _write_codes(
    first, second, rest, factors, codes, scales, zeros, height, width, rank, alpha, share, decay,
    low, high, offset, across: tl.constexpr, by_rows: tl.constexpr, when: tl.constexpr,
    group: tl.constexpr, rounds: tl.constexpr, span_zero: tl.constexpr, DTYPE: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    top, left, upper, lower = _product(
        first, second, height, width, rank, across, DTYPE, SIDE, DEPTH
    )
    _code_part(
        upper, rest, factors, codes, scales, zeros, top, left, height, width, alpha, share, decay,
        low, high, offset, by_rows, when, group, rounds, span_zero,
    )  # fmt: skip
    _code_part(
        lower, rest, factors, codes, scales, zeros, top + SIDE // 2, left, height, width, alpha,
        share, decay, low, high, offset, by_rows, when, group, rounds, span_zero,
    )  # fmt: skip
