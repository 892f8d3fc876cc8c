"""`newton_schulz.py` in Triton: tiles below the diagonal are made, those above are their mirror."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.dispatch import interpreted
from lowmem.kernels.rounding_triton import nearest

_TILE, _DEPTH = 128, 32


def symmetric_product(
    x: Tensor, added: Tensor | None, out: Tensor, turned: bool, alpha: float, beta: float
) -> None:
    side = len(out)
    if not side:
        return
    strides = (1, side) if turned else (x.shape[1], 1)
    depth = x.shape[0] if turned else x.shape[1]
    tiles = triton.cdiv(side, _TILE)
    _symmetric[(tiles * (tiles + 1) // 2,)](
        x, out if added is None else added, out, side, depth, *strides, alpha, beta,
        added is not None, interpreted(), _TILE, _DEPTH, num_warps=8, num_stages=3,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _symmetric(
    x, added, out, side, depth, side_stride, depth_stride, alpha, beta, add: tl.constexpr,
    spelt_out: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Tiles are counted row by row: tile (i, j) is number i (i + 1) / 2 + j.
    number = tl.program_id(0)
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= number).to(tl.int32)  # where the root was rounded
    i -= (i * (i + 1) // 2 > number).to(tl.int32)
    j = number - i * (i + 1) // 2
    row, column = i * TILE, j * TILE
    # Only the beginning of a tile is counted in 64 bits: every element's place takes registers.
    above = x + tl.cast(row, tl.int64) * side_stride
    beside = x + tl.cast(column, tl.int64) * side_stride
    tile, inner = tl.arange(0, TILE), tl.arange(0, DEPTH)
    at = tile[:, None] * side_stride + inner[None, :] * depth_stride
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = (inner < depth - start)[None, :]
        first = tl.cast(start, tl.int64) * depth_stride
        left = tl.load(above + first + at, inside & (tile < side - row)[:, None], 0.0)
        right = tl.load(beside + first + at, inside & (tile < side - column)[:, None], 0.0)
        if spelt_out:  # the interpreter multiplies the bits of bfloat16
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    total = total * alpha
    exists = (tile < side - row)[:, None] & (tile < side - column)[None, :]
    across = tile[:, None] * side + tile[None, :]
    below = tl.cast(row, tl.int64) * side + column
    if add:
        total += beta * tl.load(added + below + across, exists, 0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    total = nearest(total, dtype) if spelt_out else total.to(dtype)
    tl.store(out + below + across, total, exists)
    if i != j:
        mirrored = (tile < side - column)[:, None] & (tile < side - row)[None, :]
        mirror = tl.cast(column, tl.int64) * side + row
        tl.store(out + mirror + across, total.T, mirrored)
