"""`scaled_write.py` in Triton: gradient and weight are read, and what is kept of it is written."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.groupwise_triton import cut, decode, encode, places
from lowmem.kernels.rounding_triton import hashed_bits, raw, stochastic, unpacked

_TILE = {"ROWS": 8, "COLUMNS": 256}  # of a program
_TOP = tl.constexpr(255)  # codes of 8 bits


def scaled_write(
    full: Tensor, factors: Tensor, weight: Tensor, alpha: float, decay: float, decay_first: bool,
    seed_low: int, seed_high: int, offset: int,
) -> None:  # fmt: skip
    if weight.numel():
        height, width = weight.shape
        grid = (triton.cdiv(height, _TILE["ROWS"]), triton.cdiv(width, _TILE["COLUMNS"]))
        _write[grid](
            raw(full), factors, raw(weight), height, width, alpha, decay, seed_low,
            seed_high, offset, *_how(factors, decay, decay_first), **_TILE,
            enable_fp_fusion=False,
        )  # fmt: skip


def scaled_write_codes(
    full: Tensor, factors: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: int,
    stochastic: bool, span_zero: bool, alpha: float, decay: float, decay_first: bool,
    seed_low: int, seed_high: int, offset: int,
) -> None:  # fmt: skip
    if codes.numel():
        grid, shape = cut(codes.numel(), group)
        _write_codes[grid](
            raw(full), factors, codes, scales, zeros, codes.numel(), codes.shape[1], alpha,
            decay, seed_low, seed_high, offset, *_how(factors, decay, decay_first), group,
            stochastic, span_zero, group <= codes.shape[1], *shape, enable_fp_fusion=False,
        )  # fmt: skip


def _how(factors: Tensor, decay: float, decay_first: bool) -> tuple[int, int]:
    """(1 for a factor of every row, 2 of every column, 0 of the whole;
    1 for decay before the step, 2 after it, 0 for none)."""
    along = 0 if factors.numel() == 1 else 1 if factors.shape[1] == 1 else 2
    return along, 0 if not decay else 1 if decay_first else 2


@triton.jit
def _moved(value, full, at, factor, exists, alpha, decay, when: tl.constexpr):
    """Decay and step, fused where PyTorch's own kernels fuse."""
    decays, alphas = tl.zeros_like(value) - decay, tl.zeros_like(value) + alpha
    if when == 1:
        value = tl.fma(value, decays, value)
    gradient = unpacked(tl.load(full + at, exists, 0))
    value = tl.fma(alphas * gradient, factor, value)
    if when == 2:
        value = tl.fma(value, decays, value)
    return value


@triton.jit(do_not_specialize=["alpha", "decay", "seed_low", "seed_high", "offset"])
def _write(
    full, factors, weight, height, width, alpha, decay, seed_low, seed_high, offset,
    along: tl.constexpr, when: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = (row < height) & (column < width)
    at = row.to(tl.int64) * width + column
    if along == 1:
        factor = tl.load(factors + row, row < height, 0.0)
    elif along == 2:
        factor = tl.load(factors + column, column < width, 0.0)
    else:
        factor = tl.load(factors)
    value = unpacked(tl.load(weight + at, exists, 0))
    factor = tl.broadcast_to(factor, value.shape)
    value = _moved(value, full, at, factor, exists, alpha, decay, when)
    if weight.dtype.element_ty == tl.int16:
        noise = hashed_bits(at.to(tl.int32) + offset, seed_low, seed_high)
        tl.store(weight + at, stochastic(value, noise), exists)
    else:
        tl.store(weight + at, value, exists)


@triton.jit(do_not_specialize=["alpha", "decay", "seed_low", "seed_high", "offset"])
def _write_codes(
    full, factors, codes, scales, zeros, count, width, alpha, decay, seed_low, seed_high, offset,
    along: tl.constexpr, when: tl.constexpr, group: tl.constexpr, rounds: tl.constexpr,
    span_zero: tl.constexpr, crosses_once: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    groups, at, exists = places(count, group, GROUPS, WIDTH)
    there = groups * group < count
    if along == 0:
        factor = tl.load(factors)
    else:
        first = (groups * group) // width
        column = (groups * group - first * width).to(tl.int32)[:, None] + tl.arange(0, WIDTH)
        if crosses_once:  # no division per element
            further = (column >= width).to(tl.int32)
        else:
            further = column // width
        line = first[:, None] + further if along == 1 else column - further * width
        factor = tl.load(factors + line, exists, 0.0)
    value = decode(codes, scales, zeros, groups, at, exists, there)
    factor = tl.broadcast_to(factor, value.shape)
    value = tl.where(exists, _moved(value, full, at, factor, exists, alpha, decay, when), 0.0)
    index = at.to(tl.int32) + offset
    code, scale, zero = encode(value, exists, index, seed_low, seed_high, _TOP, rounds, span_zero)
    tl.store(codes + at, code.to(tl.uint8), exists)
    tl.store(scales + groups, scale, there)
    tl.store(zeros + groups, zero.to(zeros.dtype.element_ty), there)
