"""What keeps a step from growing too fast."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels.limited_scales import limited_scales, shrinking
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
        return shrinking(norm, *self._noted(state), self.gamma)

    def limited(self, over: Tensor, under: Tensor, norms: Tensor, state: State) -> Tensor:
        """Scales over / under of channels with those norms, shrunk; see `limited_scales`."""
        return limited_scales(over, under, norms, *self._noted(state), self.gamma)

    def _noted(self, state: State) -> tuple[Tensor, Tensor]:
        return tensor(state, "limiter_norm"), tensor(state, "log.limited")
