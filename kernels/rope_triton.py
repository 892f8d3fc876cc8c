"""`rope.py` in Triton: both features of a pair are read, turned and written by one thread."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.rounding_triton import packed, raw, unpacked

_PAIRS = 512  # of a program


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    if x.numel():
        _, length, heads, width = x.shape
        wide = triton.next_power_of_2(width // 2)
        rows = max(1, _PAIRS // wide)
        _rotate[(triton.cdiv(x.numel() // width, rows),)](
            raw(x), cos, sin, x.numel() // width, length, heads, width // 2, -1 if back else 1,
            rows, wide, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _rotate(
    x, cos, sin, count, length, heads, half: tl.constexpr, sign: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # a head of a token
    pairs = tl.arange(0, WIDTH)[None, :]
    exists = (rows < count)[:, None] & (pairs < half)
    angle = ((rows // heads) % length)[:, None] * half + pairs
    c, s = tl.load(cos + angle, exists, 0.0), tl.load(sin + angle, exists, 0.0)
    at = rows[:, None] * (2 * half) + pairs
    first = unpacked(tl.load(x + at, exists, 0))
    second = unpacked(tl.load(x + at + half, exists, 0))
    # Fused where PyTorch's addcmul fuses.
    turned = tl.fma(second * -sign, s, first * c)
    other = tl.fma(first * sign, s, second * c)
    tl.store(x + at, packed(turned, x.dtype.element_ty), exists)
    tl.store(x + at + half, packed(other, x.dtype.element_ty), exists)
