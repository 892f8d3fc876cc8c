"""A gradient that is scaled by channel and written into the weight in one pass over both.

    W <- round(W + alpha c s G),   G (m, n), s (m, 1), (1, n) or (1, 1);  W decays before or after

    step = Scaled(gradient, scales, 0.5)
    step(rows, 0, 512, -lr)                     # to float32 rows, in plain PyTorch: any weight
    step.write(weight, Descent(-lr))            # to the whole weight, where the kernel runs

The arithmetic is float32, in the order and with the fused products of PyTorch's own operators on
a CPU, and the noise that of `rounding.py` and `groupwise.py`: the bits that are written are theirs.
"""

from dataclasses import dataclass

from torch import Tensor

from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.groupwise import uniform

_NUMBERS = (
    "float alpha, float decay, bool decay_first, int seed_low, int seed_high, int offset) -> ()"
)
WRITE = Kernel(
    f"scaled_write(Tensor full, Tensor factors, Tensor(a!) weight, {_NUMBERS}",
    triton="scaled_write_triton",
)
WRITE_CODES = Kernel(
    "scaled_write_codes(Tensor full, Tensor factors, Tensor(a!) codes, Tensor(b!) scales, "
    f"Tensor(c!) zeros, int group, bool stochastic, bool span_zero, {_NUMBERS}",
    triton="scaled_write_triton",
)


@dataclass(frozen=True)
class Scaled:
    """The step factor * scales * full.

    full: (m, n) float32 or bfloat16. scales: float32 (m, 1), (1, n) or (1, 1).
    """

    full: Tensor
    scales: Tensor
    factor: float

    def __call__(self, rows: Tensor, start: int, stop: int, alpha: float) -> None:
        """rows += alpha * step[start:stop]; rows: (stop - start, n) float32."""
        scales = self.scales if len(self.scales) == 1 else self.scales[start:stop]
        rows.addcmul_(self.full[start:stop], scales, value=alpha * self.factor)

    def write(self, weight: Weight, descent: Descent) -> bool:
        """Change the weight by the descent; False, and nothing is done, where no kernel does."""
        if not self._writes(weight):
            return False
        numbers = (descent.alpha * self.factor, descent.decay, descent.decay_first)
        words = descent.noise_words
        if isinstance(weight, Tensor):
            WRITE(self.full, self.scales, weight, *numbers, *words)
        else:
            how = (weight.group, weight.noise is not None, weight.span_zero)
            into = (weight.codes, weight.scales, weight.zeros)
            WRITE_CODES(self.full, self.scales, *into, *how, *numbers, *words)
        return True

    def _writes(self, weight: Weight) -> bool:
        """Is there a kernel here for this weight, with noise that it makes?"""
        if isinstance(weight, GroupedWeight):
            known = weight.noise is None or weight.noise is uniform
            return known and WRITE_CODES.runs_on(weight.codes) and self.full.is_contiguous()
        dense = weight.is_contiguous() and self.full.is_contiguous()
        return dense and WRITE.runs_on(weight)
