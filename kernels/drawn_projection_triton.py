"""`drawn_projection.py` in Triton: a program adds up one segment of some channels, with its part of
the line in registers; a second kernel adds the segments, always in the same order."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.drawn_projection import SEGMENT
from lowmem.kernels.random_normal_triton import normals
from lowmem.kernels.rounding_triton import nearest, raw, unpacked

# A segment of a row is read by one warp; of columns, so many together that memory is read in whole
# lines. CHANNELS of a program, STEP of them at a time.
_TILES = {
    True: {"CHANNELS": 64, "STEP": 8, "num_warps": 4},
    False: {"CHANNELS": 64, "STEP": 64, "num_warps": 8},
}
_COLLECTED = 256  # channels of a program that adds segments


def drawn_projection(
    full: Tensor, table: Tensor, sums: Tensor, low: Tensor, norms: Tensor, right: bool,
    seed_low: int, seed_high: int,
) -> None:  # fmt: skip
    _add_segments(full, table, sums, right, seed_low, seed_high)
    _add_up(sums, low, norms)


def channel_norms(full: Tensor, sums: Tensor, norms: Tensor, right: bool) -> None:
    _add_segments(full, None, sums, right, 0, 0)
    _add_up(sums, None, norms)


def _add_segments(
    full: Tensor, table: Tensor | None, sums: Tensor, right: bool, seed_low: int, seed_high: int
) -> None:
    rows, width = full.shape
    channels, side = (rows, width) if right else (width, rows)
    strides = (width, 1) if right else (1, width)
    if full.numel():
        tile = _TILES[right]
        grid = (triton.cdiv(channels, tile["CHANNELS"]), sums.shape[0])
        _segments[grid](
            raw(full), table, sums, channels, side, *strides, seed_low, seed_high,
            SEGMENT=SEGMENT, **tile, enable_fp_fusion=False,
        )  # fmt: skip


def _add_up(sums: Tensor, low: Tensor | None, norms: Tensor) -> None:
    channels = norms.numel()
    if channels:
        grid = (triton.cdiv(channels, _COLLECTED),)
        shape = {"SIZE": _COLLECTED}
        _collect[grid](sums, low, norms, channels, len(sums), **shape, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _segments(
    full, table, sums, channels, side, channel_stride, side_stride, seed_low, seed_high,
    SEGMENT: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    kinds: tl.constexpr = 1 if table is None else 2
    segment = tl.program_id(1)
    place = segment * SEGMENT + tl.arange(0, SEGMENT)
    inside = place < side
    into = sums + segment.to(tl.int64) * kinds * channels
    if table is not None:
        line = normals(table, place, 0, seed_low, seed_high, inside)
        if full.dtype.element_ty == tl.int16:
            line = nearest(line, tl.bfloat16).to(tl.float32)
    for start in range(0, CHANNELS, STEP):
        channel = tl.program_id(0) * CHANNELS + start + tl.arange(0, STEP)
        there = channel < channels
        lines = full + channel.to(tl.int64)[:, None] * channel_stride
        at = lines + place.to(tl.int64)[None, :] * side_stride
        g = unpacked(tl.load(at, there[:, None] & inside[None, :], 0))
        tl.store(into + channel, tl.sum(g * g, axis=1), there)
        if table is not None:
            tl.store(into + channels + channel, tl.sum(g * line[None, :], axis=1), there)


@triton.jit
def _collect(sums, low, norms, channels, segments, SIZE: tl.constexpr):
    kinds: tl.constexpr = 1 if low is None else 2
    channel = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = channel < channels
    squares, images = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for segment in range(segments):
        at = sums + segment * kinds * channels + channel
        squares += tl.load(at, there, 0.0)
        if low is not None:
            images += tl.load(at + channels, there, 0.0)
    tl.store(norms + channel, tl.sqrt_rn(squares), there)
    if low is not None:
        if low.dtype.element_ty == tl.bfloat16:
            images = nearest(images, tl.bfloat16)
        tl.store(low + channel, images, there)
