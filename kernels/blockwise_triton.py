"""`blockwise.py` in Triton: a program works on a few whole blocks."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.slices import BLOCK

_FIRST = tl.constexpr(0x34000000)  # as in blockwise.py
_ONE = tl.constexpr(0x3F800000)
_BUCKETS = tl.constexpr(((0x3F800000 - 0x34000000) >> 16) + 1)
_TINY = tl.constexpr(1e-38)
PER_PROGRAM = 4  # blocks
OPTIONS = {"BLOCK": BLOCK, "PER_PROGRAM": PER_PROGRAM, "enable_fp_fusion": False}


def grid_of(elements: int) -> tuple[int]:
    """Programs for that many elements."""
    return (triton.cdiv(elements, BLOCK * PER_PROGRAM),)


def blockwise_quantize(
    x: Tensor, values: Tensor, table: Tensor, codes: Tensor, absmax: Tensor, lift: bool
) -> None:
    if x.numel():
        _quantize[grid_of(x.numel())](x, table, codes, absmax, x.numel(), lift, **OPTIONS)


def blockwise_dequantize(codes: Tensor, absmax: Tensor, values: Tensor, out: Tensor) -> None:
    if codes.numel():
        _dequantize[grid_of(codes.numel())](codes, absmax, values, out, codes.numel(), **OPTIONS)


@triton.jit
def places(count, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr):
    """(blocks, elements of each, which of those exist) of this program."""
    blocks = tl.program_id(0).to(tl.int64) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    elements = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return blocks, elements, elements < count


@triton.jit
def encode(x, blocks, count, table, lift: tl.constexpr, BLOCK: tl.constexpr):
    """(codes, absmax) of blocks of x; numbers that do not exist are zeros."""
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # As integers, so that NaN is the largest of all.
    absmax = tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)
    divisor = tl.where(absmax < _TINY, _TINY, absmax)
    short = count - blocks * BLOCK < BLOCK
    inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    divided = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    scaled = tl.where(short[:, None], divided, x * inverse[:, None])
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, _ONE)
    bucket = (tl.maximum(magnitude, _FIRST) - _FIRST) >> 16
    found = tl.load(table + bucket + tl.where(bits < 0, _BUCKETS, 0))
    beyond = ((magnitude & 0xFFFF) > (found & 0xFFFF)).to(tl.int32)
    code = (found >> 16) + tl.where(bits < 0, -beyond, beyond)
    if lift:
        code = tl.where((code == 0) & (x > 0), 1, code)
    return code.to(tl.uint8), tl.where(short, divisor, absmax)


@triton.jit
def decode(codes, absmax, values):
    """map[codes] * absmax. codes: (blocks, BLOCK); absmax: (blocks,)."""
    return tl.load(values + codes.to(tl.int32)) * absmax[:, None]


@triton.jit
def _quantize(
    x, table, codes, absmax, count, lift: tl.constexpr, BLOCK: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    blocks, at, exists = places(count, BLOCK, PER_PROGRAM)
    code, scale = encode(tl.load(x + at, exists, 0.0), blocks, count, table, lift, BLOCK)
    tl.store(codes + at, code, exists)
    tl.store(absmax + blocks, scale, blocks * BLOCK < count)


@triton.jit
def _dequantize(
    codes, absmax, values, out, count, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr
):  # fmt: skip
    blocks, at, exists = places(count, BLOCK, PER_PROGRAM)
    scale = tl.load(absmax + blocks, blocks * BLOCK < count, 0.0)
    tl.store(out + at, decode(tl.load(codes + at, exists, 0), scale, values), exists)
