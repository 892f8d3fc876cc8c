"""Targets drawn from softmax(x W'), with the logits of one slice of the vocabulary at a time.

    target = argmax_v (l_v + G_v),   l = x W',   G_v = -log(-log U_v)

The largest logit with Gumbel noise is a draw from the softmax, and a running maximum needs neither
the sum of exponentials nor the other slices. The noise is a hash of (seed, place), so a resumed run
draws the same targets; devices differ only where rounding makes their logits differ.

Source: Maddison, Tarlow & Minka, arXiv:1411.0030, section 2 (Gumbel-max).
"""

import math

import torch
from torch import Tensor

from lowmem.kernels.grouped_weight import GroupedWeight, Weight, float_rows
from lowmem.kernels.linear_cross_entropy import IGNORED
from lowmem.kernels.rounding import hashed_bits
from lowmem.kernels.slices import pieces
from lowmem.naming import seed_of

SLICE_ELEMENTS = 2**22  # of noise at a time, on every device: the draws depend on it


def drawn_targets(x: Tensor, weight: Weight, targets: Tensor, seed: int) -> Tensor:
    """(n,) int64: a draw per token, and -100 where `targets` has it. x (n, h), weight (V, h)."""
    rows = max(1, SLICE_ELEMENTS // max(1, len(x)))
    if isinstance(weight, GroupedWeight):
        rows = -(-rows // weight.group) * weight.group  # each slice begins a group
    best = torch.full(targets.shape, -math.inf, dtype=torch.float32, device=x.device)
    drawn = torch.zeros_like(targets)
    for start, stop in pieces(weight.shape[0], rows, x.is_meta):
        noisy = _gumbel((stop - start) * len(x), seed_of(seed, "slice", start), x.device)
        noisy = noisy.view(stop - start, len(x)).add_(float_rows(weight, start, stop) @ x.t())
        value, index = noisy.max(0)
        drawn = torch.where(value > best, index.add_(start), drawn)
        best = torch.maximum(best, value)
        del noisy
    return drawn.masked_fill_(targets == IGNORED, IGNORED)


def _gumbel(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) float32 numbers -log(E) with E ~ Exp(1), exact to 2^-31 in the upper tail.

    E = -log(1 - U), so that the smallest E, which decide, come from the smallest U: those are exact
    in float32. The largest noise is 22.2.
    """
    bits = hashed_bits(count, seed, 0, device).bitwise_and_(2**31 - 1)
    uniform = bits.float().add_(0.5).mul_(2.0**-31)
    return uniform.neg_().log1p_().neg_().log_().neg_()
