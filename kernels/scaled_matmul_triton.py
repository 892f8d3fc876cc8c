"""`scaled_matmul.py` in Triton: codes are made in one pass over a matrix, and a product of codes
is scaled, added to and rounded in registers, so that its sums are never in memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.dispatch import interpreted
from lowmem.kernels.rounding_triton import nearest, raw, unpacked
from lowmem.kernels.scaled_matmul import LARGEST, SMALLEST_SCALE

_PIECE = 2048  # of a row, read at a time
_ROWS, _COLUMNS = 128, 32  # of a tile that is turned around
_TILE, _DEPTH = 128, 64  # of a product; _DEPTH: numbers summed at a time
_FEWEST = 16  # rows of a tile


def row_codes(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    count, width = rows.shape
    if count:
        piece = min(_PIECE, triton.next_power_of_2(max(1, width)))
        _row_codes[(count,)](
            raw(rows), codes, scales, width, codes.shape[1], 1 / LARGEST[codes.dtype],
            SMALLEST_SCALE, interpreted(), piece, enable_fp_fusion=False,
        )  # fmt: skip


def column_codes(rows: Tensor, scales: Tensor, codes: Tensor, start: int) -> None:
    count, width = rows.shape
    grid = (triton.cdiv(count, _ROWS), triton.cdiv(width, _COLUMNS))
    if rows.numel():
        _column_codes[grid](
            raw(rows), scales, codes, count, width, codes.shape[1], start, interpreted(), _ROWS,
            _COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip


def scaled_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, added: Tensor | None, out: Tensor,
    accumulate: bool,
) -> None:  # fmt: skip
    if not out.numel():
        return
    (tokens, depth), outputs = a.shape, len(b)
    tile = min(max(triton.next_power_of_2(tokens), _FEWEST), _TILE)
    beside = out if accumulate else added
    kind = 0 if beside is None else beside.dim()
    _product[(triton.cdiv(tokens, tile) * triton.cdiv(outputs, _TILE),)](
        a, a_scales, b, b_scales, out if beside is None else beside, out, tokens, outputs, depth,
        kind, a.dtype == torch.int8, interpreted(), tile, _TILE, _DEPTH,
        num_warps=8 if tile >= _TILE // 2 else 4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _codes_of(value, scale, dtype: tl.constexpr, spelt_out: tl.constexpr):
    """value / scale, rounded to the numbers of the codes; ties to even."""
    ratio = tl.div_rn(value, scale)
    if dtype == tl.int8:
        ratio = tl.where(ratio != ratio, 0.0, ratio)  # its scale is infinite
        ratio = (ratio + 12582912.0) - 12582912.0  # to the nearest integer, of numbers below 2^22
    elif spelt_out:  # the interpreter rounds wrongly
        bits = ratio.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576  # to 3 bits of fraction
        least = (ratio + 24576.0) - 24576.0  # to a multiple of 2^-9
        ratio = tl.where(tl.abs(ratio) < 0.015625, least, bits.to(tl.float32, bitcast=True))
    return ratio.to(dtype)


@triton.jit
def _row_codes(
    rows,
    codes,
    scales,
    width,
    stride,
    share,
    smallest,
    spelt_out: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.arange(0, PIECE)
    rows += row.to(tl.int64) * width
    codes += row.to(tl.int64) * stride
    largest = tl.zeros([PIECE], tl.float32)
    for start in range(0, width, PIECE):
        value = unpacked(tl.load(rows + start + place, place < width - start, 0))
        size = tl.where(value != value, float("inf"), tl.abs(value))
        largest = tl.maximum(largest, size)
    scale = tl.maximum(tl.max(largest, axis=0) * share, smallest)
    tl.store(scales + row, scale)
    scale = tl.zeros([PIECE], tl.float32) + scale
    for start in range(0, width, PIECE):
        there = place < width - start
        value = unpacked(tl.load(rows + start + place, there, 0))
        code = _codes_of(value, scale, codes.dtype.element_ty, spelt_out)
        tl.store(codes + start + place, code, there)


@triton.jit
def _column_codes(
    rows, scales, codes, count, width, stride, start, spelt_out: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < count)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    scale = tl.load(scales + column, column < width, 1.0)
    scale = tl.broadcast_to(scale[None, :], [ROWS, COLUMNS])
    value = unpacked(tl.load(rows + at, there, 0))
    code = _codes_of(value, scale, codes.dtype.element_ty, spelt_out)
    turned = column.to(tl.int64)[:, None] * stride + start + row[None, :]
    tl.store(codes + turned, code.T, there.T)


@triton.jit
def _product(
    a, a_scales, b, b_scales, added, out, tokens, outputs, depth, added_dims: tl.constexpr,
    whole: tl.constexpr, spelt_out: tl.constexpr, TOKENS: tl.constexpr, OUT: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    # Tiles of tokens that need the same weights run one after the other and find them in the cache.
    tiles = tl.cdiv(tokens, TOKENS)
    token, place = (tl.program_id(0) % tiles) * TOKENS, (tl.program_id(0) // tiles) * OUT
    down, across, inner = tl.arange(0, TOKENS), tl.arange(0, OUT), tl.arange(0, DEPTH)
    # Only the beginning of a tile is counted in 64 bits: every element's place takes registers.
    a += tl.cast(token, tl.int64) * depth
    b += tl.cast(place, tl.int64) * depth
    left_at = down[:, None] * depth + inner[None, :]
    right_at = across[:, None] * depth + inner[None, :]
    total = tl.zeros((TOKENS, OUT), tl.int32 if whole else tl.float32)
    for start in range(0, depth, DEPTH):
        inside = (inner < depth - start)[None, :]
        left = tl.load(a + start + left_at, inside & (down < tokens - token)[:, None], 0.0)
        right = tl.load(b + start + right_at, inside & (across < outputs - place)[:, None], 0.0)
        if whole:
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
        else:  # sums of a tile go to float32 registers: tensor cores of 9.0 keep fewer bits
            total = tl.dot(left, right.T, total, max_num_imprecise_acc=DEPTH)
    scale = tl.load(a_scales + token + down, down < tokens - token, 0.0)
    result = total.to(tl.float32) * scale[:, None]
    scale = tl.load(b_scales + place + across, across < outputs - place, 0.0)
    result = result * scale[None, :]
    exists = (down < tokens - token)[:, None] & (across < outputs - place)[None, :]
    at, begin = (
        down[:, None] * outputs + across[None, :],
        tl.cast(token, tl.int64) * outputs + place,
    )
    if added_dims == 1:
        line = tl.load(added + place + across, across < outputs - place, 0.0)
        result += line.to(tl.float32)[None, :]
    elif added_dims == 2:
        result += tl.load(added + begin + at, exists, 0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    result = nearest(result, dtype) if spelt_out else result.to(dtype)
    tl.store(out + begin + at, result, exists)
