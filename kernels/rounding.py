"""Stochastic rounding to bfloat16 with counter-based noise.

A float32 between two neighbouring bfloat16 numbers becomes the upper one with a probability equal
to its position between them, so small updates survive on average where nearest rounding would
drop them. The noise of element i is a hash of (seed, i): the same on every device, in every
update mode and after a resume, with no generator to store.

Source: the rounding is e.g. Gupta et al., arXiv:1502.02551, section 4; the mixing constants are
Wellons' `lowbias32` and Vigna's `splitmix64` (both public domain).
"""

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel

ROUND = Kernel(
    "round_bf16(Tensor x, Tensor(a!) out, int low, int high, int offset) -> ()",
    triton="rounding_triton",
    native=True,
)


def signed(value: int) -> int:
    """The int32 with the same low 32 bits."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def _mixed(seed: int) -> int:
    """A 64-bit number in which every bit of the seed matters (splitmix64): neighbouring seeds must
    not give permutations of one another's noise."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def seed_words(seed: int) -> tuple[int, int]:
    """What of a seed enters the hash: two int32."""
    mixed = _mixed(seed)
    return signed(mixed), signed(mixed >> 32)


def hashed_bits(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """`count` pseudo-random int32 numbers of 32 uniform bits, for indices offset, offset + 1, ...

    Integer arithmetic wraps, which torch does on every device; shifts are made logical by masks.
    """
    low, high = seed_words(seed)
    x = torch.arange(count, dtype=torch.int32, device=device)
    x.add_(signed(offset)).bitwise_xor_(low)
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B)):
        x.bitwise_xor_((x >> shift).bitwise_and_(mask)).mul_(signed(factor))
        x.add_(high)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def round_into(target: Tensor, x: Tensor, seed: int, offset: int = 0) -> None:
    """target (bfloat16, contiguous) <- `stochastic_round` of x, which is consumed."""
    if ROUND.runs_on(x):
        ROUND(x, target, *seed_words(seed), signed(offset))
    else:
        target.copy_(stochastic_round(x, seed, offset))


def stochastic_round(x: Tensor, seed: int, offset: int = 0) -> Tensor:
    """x (float32, contiguous) rounded to bfloat16, unbiased; element i uses noise offset + i.

    x is consumed: its memory is overwritten.
    """
    noise = hashed_bits(x.numel(), seed, offset, x.device).bitwise_and_(0xFFFF)
    # NaN and infinity take no noise: it would carry a NaN of all ones into the sign and to -0.
    noise.masked_fill_(x.view(-1).isfinite().logical_not_(), 0)
    bits = x.view(-1).view(torch.int32)
    bits.add_(noise).bitwise_and_(signed(0xFFFF0000))
    return x.to(torch.bfloat16)
