"""`random_normal.py` in Triton: a program makes numbers from their index, and keeps none."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.rounding_triton import hashed_bits

_SIZE = 1024  # elements of a program


def random_normal(out: Tensor, table: Tensor, low: int, high: int, pair: int) -> None:
    if out.numel():
        grid, options = (triton.cdiv(out.numel(), _SIZE),), {"SIZE": _SIZE}
        _normal[grid](table, out, out.numel(), low, high, pair, **options, enable_fp_fusion=False)


@triton.jit
def normals(table, at, pair, low, high, exists):
    """The numbers of these indices, counted from an even one; pair: half of that one."""
    bits = hashed_bits((at >> 1).to(tl.int32) + pair, low, high)
    level = tl.where((at & 1) == 0, bits, bits >> 16) & 0xFFFF
    return tl.load(table + level, exists, 0.0)


@triton.jit(do_not_specialize=["low", "high", "pair"])
def _normal(table, out, count, low, high, pair, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    exists = at < count
    tl.store(out + at, normals(table, at, pair, low, high, exists), exists)
