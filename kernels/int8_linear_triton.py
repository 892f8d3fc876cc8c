"""`int8_linear.py` in Triton: a program makes one tile of the result, and floats of the codes that
it meets on the way.

Both products load tiles of codes as they lie, (rows, columns of the weight); that of a linear layer
sums along the columns and turns each tile around, that of the gradient sums along the rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.dispatch import interpreted
from lowmem.kernels.rounding_triton import nearest

_OUT, _DEPTH = 64, 64  # of a tile: columns of the result, and numbers summed at a time
# Of a tile, fewest and most. On compute 8.x warps that share columns each make the same floats: two
# warps of four at 64 tokens, four of eight at 128 (seen in the code that Triton makes).
_TOKENS = (16, 64)


def int8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, added: Tensor | None, out: Tensor,
    group: int,
) -> None:  # fmt: skip
    stride = 0 if added is None or added.dim() == 1 else out.shape[1]
    _launch(x, (codes, scales, zeros), out if added is None else added, stride, out, group,
            turned=True, add=added is not None)  # fmt: skip


def int8_input_gradient(
    grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor, group: int,
    accumulate: bool,
) -> None:  # fmt: skip
    _launch(grad, (codes, scales, zeros), out, out.shape[1], out, group,
            turned=False, add=accumulate)  # fmt: skip


def _launch(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor], added: Tensor, stride: int, out: Tensor,
    group: int, *, turned: bool, add: bool,
) -> None:  # fmt: skip
    if not out.numel():
        return
    tokens, (rows, width) = len(x), weight[0].shape
    tile = min(max(triton.next_power_of_2(tokens), _TOKENS[0]), _TOKENS[1])
    whole = width % group == 0 and group % max(_OUT, _DEPTH) == 0
    grid = (triton.cdiv(tokens, tile) * triton.cdiv(out.shape[1], _OUT),)
    _product[grid](
        x, *weight, added, out, tokens, rows, width, stride, group, turned, add, whole,
        interpreted(), tile, _OUT, _DEPTH if whole else _DEPTH // 2,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _values(
    codes, scales, zeros, row, column, rows, width, group: tl.constexpr, whole: tl.constexpr,
    dtype: tl.constexpr, spelt_out: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile of the weight that begins at (row, column), as `group_dequantize` makes it.

    whole: every row of the tile lies in one group.
    """
    # Only the tile's beginning is counted in 64 bits: every element's place would take registers.
    begin = tl.cast(row, tl.int64) * width + column
    down, across = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = down < rows - row
    at = down[:, None] * width + across[None, :]
    exists = there[:, None] & (across < width - column)[None, :]
    code = tl.load(codes + begin + at, exists, 0)
    if whole:
        lines = begin // group + down * (width // group)
        scale = tl.load(scales + lines, there, 0.0)[:, None]
        zero = tl.load(zeros + lines, there, 0)[:, None]
    else:
        lines = ((begin % group).to(tl.int32) + at) // group
        scale = tl.load(scales + begin // group + lines, exists, 0.0)
        zero = tl.load(zeros + begin // group + lines, exists, 0)
    # A code in the last bits of 2^23 is 2^23 + code: cheaper than turning an integer into a float.
    shifted = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    value = (shifted - (zero.to(tl.float32) + 8388608.0)) * scale
    return nearest(value, dtype) if spelt_out else value.to(dtype)


@triton.jit
def _product(
    x, codes, scales, zeros, added, out, tokens, rows, width, stride, group: tl.constexpr,
    turned: tl.constexpr, add: tl.constexpr, whole: tl.constexpr, spelt_out: tl.constexpr,
    TOKENS: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    # Tiles of tokens that need the same codes run one after the other and find them in the cache.
    tiles = tl.cdiv(tokens, TOKENS)
    token, place = (tl.program_id(0) % tiles) * TOKENS, (tl.program_id(0) // tiles) * OUT
    depth, outputs = (width, rows) if turned else (rows, width)
    down, across, inner = tl.arange(0, TOKENS), tl.arange(0, OUT), tl.arange(0, DEPTH)
    x += tl.cast(token, tl.int64) * depth
    at = down[:, None] * depth + inner[None, :]
    total = tl.zeros((TOKENS, OUT), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = (down < tokens - token)[:, None] & (inner < depth - start)[None, :]
        piece = tl.load(x + start + at, inside, 0.0)
        if turned:
            weight = _values(
                codes, scales, zeros, place, start, rows, width, group, whole, dtype, spelt_out,
                OUT, DEPTH,
            ).T  # fmt: skip
        else:
            weight = _values(
                codes, scales, zeros, start, place, rows, width, group, whole, dtype, spelt_out,
                DEPTH, OUT,
            )  # fmt: skip
        if spelt_out:  # the interpreter multiplies the bits of bfloat16
            piece, weight = piece.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(piece, weight, total, input_precision="ieee")
    exists = (down < tokens - token)[:, None] & (across < outputs - place)[None, :]
    if add:
        added += tl.cast(token, tl.int64) * stride + place
        total += tl.load(added + down[:, None] * stride + across[None, :], exists, 0.0).to(
            tl.float32
        )
    total = nearest(total, dtype) if spelt_out else total.to(dtype)
    out += tl.cast(token, tl.int64) * outputs + place
    tl.store(out + down[:, None] * outputs + across[None, :], total, exists)
