"""How a step changes a weight, and what a step is.

W <- round(W + alpha step - decay W),   decay before the step or after it

descent = Descent(alpha=-lr, decay=lr * weight_decay, decay_first=False, seed=seed)
descent.move(rows, step, 0, 512)            # float32 rows, in plain PyTorch: any step
step.write(weight, descent)                 # the whole weight, where a kernel does it
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lowmem.kernels.grouped_weight import Weight
from lowmem.kernels.rounding import seed_words, signed

Step = Callable[[Tensor, int, int, float], None]
"""step(rows, start, stop, alpha): add alpha * direction[start:stop] to these float32 rows of the
weight. Called once for every group of rows, from the first to the last; start * row length is a
multiple of 256. The whole direction need never be in memory."""


@dataclass(frozen=True)
class Descent:
    """What of an update is the same for all elements of a weight.

    alpha: of the step, minus the learning rate. decay: of the weight, learning rate included.
    seed, offset: of the rounding's noise; element i has the noise of (seed, offset + i).
    """

    alpha: float
    decay: float = 0.0
    decay_first: bool = False
    seed: int = 0
    offset: int = 0

    @property
    def noise_words(self) -> tuple[int, int, int]:
        """Seed and offset as kernels take them: three int32."""
        return (*seed_words(self.seed), signed(self.offset))

    def move(self, rows: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """Decay and step of the weight's rows, float32, in place."""
        # Not times 1 - decay: in float32 that rounds away the digits of a small decay.
        if self.decay_first and self.decay:
            rows.add_(rows, alpha=-self.decay)
        step(rows, start, stop, self.alpha)
        if not self.decay_first and self.decay:
            rows.add_(rows, alpha=-self.decay)
        return rows


@runtime_checkable
class WritesItself(Protocol):
    """What else a Step may have: a kernel that does all of a descent for some weights."""

    def write(self, weight: Weight, descent: Descent) -> bool:
        """Change the weight, rounding included. False, and nothing is done, where no kernel does
        that: its rows are asked for."""
