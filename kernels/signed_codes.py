"""Signed 8-bit codes with one float32 scale per 256 elements, rounded stochastically.

    codes, scales = quantize(x, uniform(x.numel(), seed, 0, x.device))    x ~ codes * scale

A scale is a 127th of the block's largest magnitude, so nothing is ever clipped, and a value between
two codes becomes the upper one with a probability equal to its position between them: the codes are
right on average. All of it is float32. What is not finite makes its whole block not finite.

Source: the rounding is e.g. Gupta et al., arXiv:1502.02551, section 4; the scales Dettmers et al.,
arXiv:2110.02861, section 2, for a map of equal steps.
"""

import torch
from torch import Tensor

from lowmem.kernels.blockwise import BLOCK, block_count

_TOP = 127
_TINY = 1e-38  # divisor of an all-zero block


def quantize(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, int8; scales, one per block) of x: (n,) float32, contiguous. x is consumed.

    noise: (n,) uniform in [0, 1).
    """
    whole, scales = x.numel() // BLOCK * BLOCK, x.new_empty(block_count(x.numel()))
    for start, stop in _spans(whole, x.numel()):
        rows = x[start:stop].view(-1, min(BLOCK, stop - start))
        scale = scales[start // BLOCK : block_count(stop)]
        torch.amax(rows.abs(), dim=1, out=scale)
        scale.div_(_TOP)
        rows.div_(scale.clamp(min=_TINY).unsqueeze(1))
    # The largest value over its scale may be 127 and a bit: that and its noise must not wrap.
    return x.add_(noise).floor_().clamp_(-_TOP, _TOP).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """codes * scale, (n,) float32. The first code begins a block."""
    values = codes.float()
    for start, stop in _spans(values.numel() // BLOCK * BLOCK, values.numel()):
        rows = values[start:stop].view(-1, min(BLOCK, stop - start))
        rows.mul_(scales[start // BLOCK : block_count(stop)].unsqueeze(1))
    return values


def _spans(whole: int, elements: int) -> list[tuple[int, int]]:
    """The whole blocks, and the last one if it is shorter."""
    spans = [(0, whole), (whole, elements)]
    return [(start, stop) for start, stop in spans if start < stop]
