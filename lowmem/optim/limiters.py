"""What keeps a step from growing too fast."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor


@dataclass(frozen=True)
class NormGrowth:
    """The norm of a step may grow by a factor of `gamma` per update, and fall as it likes.

        f = max(|Z| / (z + 1e-8), gamma) / gamma;   Z <- Z / f;   z <- |Z|

    The first norm passes. One that is zero or not finite is not remembered: from z = 0 the norm
    would need 1850 updates back to 1. A huge gamma turns the limiter off.

    State: limiter_norm, that is z, infinite until there is one; log.limited, 1 where it acted.

    Source: Chen et al. 2024 (Fira), arXiv:2410.01623 (norm-growth limiter).
    """

    gamma: float = 1.01

    def init(self, state: State, device: torch.device) -> None:
        state["limiter_norm"] = torch.full((), math.inf, device=device)
        state["log.limited"] = torch.zeros((), device=device)

    def shrink(self, norm: Tensor, state: State) -> Tensor:
        """What to multiply a step of that norm by, 0-dim; notes the norm that results."""
        last = tensor(state, "limiter_norm")
        excess = (norm / (last + 1e-8).mul_(self.gamma)).clamp_(min=1.0)
        limited = norm / excess
        torch.where(limited > 0, limited, last, out=last)  # infinity / infinity is not > 0
        tensor(state, "log.limited").copy_(excess > 1)
        return excess.reciprocal_()
