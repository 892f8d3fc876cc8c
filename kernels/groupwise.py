"""Group quantisation: unsigned codes with a float32 scale and zero point per group.

    codes, scales, zeros = quantize(x, bits=4, group=256)       x ~ (codes - zero) * scale
    packed = pack(codes)                                        two 4-bit codes per byte

Groups are consecutive elements in memory order, the last one may be shorter. Noise makes rounding
stochastic, so that a step of a tenth of a code moves a weight by a tenth of a code on average.
All of it is float32: in bf16 the fraction that decides would itself be rounded away.

Source: Zhang et al. 2024 (Q-GaLore), arXiv:2407.08296, sections 3.2 and 3.4.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.rounding import hashed_bits, seed_words, signed

QUANTIZE = Kernel(
    "group_quantize(Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) zeros, int top, "
    "int group, bool stochastic, int low, int high, int offset, bool span_zero) -> ()",
    triton="groupwise_triton",
)
DEQUANTIZE = Kernel(
    "group_dequantize(Tensor codes, Tensor scales, Tensor zeros, Tensor(a!) out, int group) -> ()",
    triton="groupwise_triton",
)

_LEAST_RANGE = 1e-5  # of a group's values

Noise = Callable[[int, int, int, torch.device], Tensor]
"""noise(count, seed, offset, device): float32 in [0, 1) for the elements offset, offset + 1, ..."""


class Groups(NamedTuple):
    """codes: uint8, of x's shape. scales: float32, zeros: of any dtype that holds codes, one per
    group."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def group_count(elements: int, group: int) -> int:
    """Number of groups of that many elements."""
    return -(-elements // group)


def uniform(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """Noise as a hash of (seed, element): the same on every device and after a resume."""
    # 24 bits, each of which float32 holds.
    return hashed_bits(count, seed, offset, device).bitwise_and_(0xFFFFFF) * 2.0**-24


def quantize(
    x: Tensor, bits: int, group: int, noise: Tensor | None = None, span_zero: bool = True
) -> Groups:
    """Codes of x (float32, contiguous), with scales and zero points chosen from its values.

    noise: uniform in [0, 1), one per element, to round up where it is below the fraction; None
    rounds to the nearest code, ties to even. span_zero: every group's range includes 0. As
    published it does not, and since zero points are codes, a group far from 0 is crushed.
    """
    flat, top = x.view(-1), 2**bits - 1
    count = group_count(flat.numel(), group)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    scales, zeros = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
    for groups, elements in _groups(flat.numel(), group):
        rows = flat[elements].view(groups.stop - groups.start, -1)
        least, most = rows.aminmax(dim=1, keepdim=True)
        if span_zero:
            least, most = least.clamp(max=0.0), most.clamp(min=0.0)
        scale = (most - least).clamp_(min=_LEAST_RANGE).div_(top)
        zero = least.div(scale).round_().neg_().clamp_(0, top)
        ratio = rows / scale
        if noise is None:
            ratio.round_()
        else:
            ratio = _rounded_by(noise.view(-1)[elements].view(rows.shape), ratio)
        codes[elements] = ratio.add_(zero).clamp_(0, top).view(-1).to(torch.uint8)
        scales[groups], zeros[groups] = scale.view(-1), zero.view(-1)
    return Groups(codes.view(x.shape), scales, zeros)


def quantize_into(
    into: Groups,
    x: Tensor,
    bits: int,
    group: int,
    at: tuple[int, int] | None = None,
    noise: Noise = uniform,
    span_zero: bool = True,
) -> None:
    """Write the codes of x, with their scales and zero points, where they are kept; contiguous.

    at: (seed, number of the first element) of the noise; None rounds to nearest.
    """
    if QUANTIZE.runs_on(x) and (at is None or noise is uniform):
        seed, first = at or (0, 0)
        words = (*seed_words(seed), signed(first))
        QUANTIZE(x, *into, 2**bits - 1, group, at is not None, *words, span_zero)
        return
    drawn = None if at is None else noise(x.numel(), *at, x.device)
    for kept, new in zip(into, quantize(x, bits, group, drawn, span_zero), strict=True):
        kept.copy_(new)


def _rounded_by(noise: Tensor, ratio: Tensor) -> Tensor:
    below = ratio.floor()
    return below.add_(noise < ratio.sub_(below))


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(codes - zero) * scale of the shape of codes. The first code begins a group.

    zeros: of any dtype that holds them. dtype: float32 or bfloat16, which holds codes - zero
    exactly, so that the product with the float32 scale is the only thing that is rounded.
    """
    if DEQUANTIZE.runs_on(codes):
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        DEQUANTIZE(codes.contiguous(), scales, zeros, out, group)
        return out
    values = codes.reshape(-1).to(dtype)
    for groups, elements in _groups(values.numel(), group):
        rows = values[elements].view(groups.stop - groups.start, -1)
        rows.sub_(zeros[groups].unsqueeze(1)).mul_(scales[groups].unsqueeze(1))
    return values.view(codes.shape)


def _groups(elements: int, group: int) -> Iterator[tuple[slice, slice]]:
    """(groups, their elements): the whole ones, and the last one if it is shorter."""
    whole = elements // group
    if whole:
        yield slice(0, whole), slice(0, whole * group)
    if whole * group < elements:
        yield slice(whole, whole + 1), slice(whole * group, elements)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes of any shape -> (ceil(n / 2),) uint8, the earlier one in the low half."""
    flat = codes.reshape(-1)
    packed = flat[0::2].clone()
    packed[: flat.numel() // 2].bitwise_or_(flat[1::2] << 4)
    return packed


def unpack(packed: Tensor, count: int) -> Tensor:
    """The `count` codes that `pack` was given, flat."""
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:count]
