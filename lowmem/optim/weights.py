"""Write a step into a weight: decay, and stochastic rounding where the weight is bfloat16."""

import torch
from torch import Tensor

from lowmem.kernels.rounding import stochastic_round
from lowmem.kernels.slices import row_slices
from lowmem.optim.projectors import Rows


def write(
    weight: Tensor, rows: Rows, *, lr: float, weight_decay: float, decay_first: bool, seed: int
) -> None:
    """weight <- weight - lr * direction, with decoupled decay before or after; in place.

    rows(start, stop) gives rows of the direction. seed: of this weight's rounding in this update.
    The arithmetic is float32 whatever the weight's format; no full-size temporary appears.
    """
    keep = 1.0 - lr * weight_decay
    width = weight.numel() // max(1, weight.shape[0])
    for start, stop in row_slices(weight):
        target = weight[start:stop]
        exact = target if target.dtype == torch.float32 else target.float()
        if decay_first and keep != 1.0:
            exact.mul_(keep)
        exact.add_(rows(start, stop), alpha=-lr)
        if not decay_first and keep != 1.0:
            exact.mul_(keep)
        if exact is not target:
            target.copy_(stochastic_round(exact, seed, start * width))
