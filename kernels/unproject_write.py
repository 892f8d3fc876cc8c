"""A low-rank step that is multiplied out and written into the weight tile by tile.

    W <- round(W + alpha (A B + c s G)),   A (m, r), B (r, n);  W decays before or after

    step = Product(low, basis.T)
    step(rows, 0, 512, -lr)                     # to float32 rows, in plain PyTorch: any weight
    step.write(weight, Descent(-lr))            # to the whole weight, where the kernel runs

A tile of A B is summed in float32 registers, meets its part of W there, and only what is kept of W
is written: one pass over W, one over G, one launch. PyTorch rounds A B of bfloat16 factors once
more, to bfloat16, before it adds it.

What is multiplied has the dtype of the weight's gradients: bfloat16 factors stay as they are,
float32 ones become bfloat16 where the weight is bfloat16 or codes; float32 weights take float32
factors, without TF32. With u = 2^-8 if a factor is rounded, else 0, an element of A B is within
(2 u + r 2^-23) sum_k |A_ik B_kj| of the exact one; 2^-23 for tensor cores cut where others round.

Source: Zhao et al. 2024 (GaLore), arXiv:2403.03507, Algorithm 2; Chen et al. 2024 (Fira),
arXiv:2410.01623, for the rest. Rounding as in `rounding.py` and `groupwise.py`, noise included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.groupwise import uniform
from lowmem.kernels.scaled_write import Scaled

_STEP = "Tensor first, Tensor second, bool across, Tensor? rest, Tensor? factors, "
_NUMBERS = "float alpha, float share, float decay, bool decay_first, int low, int high, int offset"
WRITE = Kernel(
    f"unproject_write({_STEP}Tensor(a!) weight, {_NUMBERS}) -> ()",
    triton="unproject_write_triton",
)
WRITE_CODES = Kernel(
    f"unproject_write_codes({_STEP}Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) zeros, "
    f"{_NUMBERS}, int group, bool stochastic, bool span_zero) -> ()",
    triton="unproject_write_triton",
)

TILE = 128  # rows and columns that a program writes


@dataclass(frozen=True)
class Product:
    """The step first @ second + rest: (m, r) by (r, n), both float32 or both bfloat16."""

    first: Tensor
    second: Tensor
    rest: Scaled | None = None

    def __call__(self, rows: Tensor, start: int, stop: int, alpha: float) -> None:
        """rows += alpha * step[start:stop]; rows: (stop - start, n) float32."""
        first = self.first[start:stop]
        if rows.dtype == first.dtype:
            rows.addmm_(first, self.second, alpha=alpha)
        else:
            rows.add_(first @ self.second, alpha=alpha)
        if self.rest is not None:
            self.rest(rows, start, stop, alpha)

    def write(self, weight: Weight, descent: Descent) -> bool:
        """Change the weight by the descent; False, and nothing is done, where no kernel does."""
        share = descent.alpha * (self.rest.factor if self.rest else 0.0)
        numbers = (descent.alpha, share, descent.decay, descent.decay_first)
        words = descent.noise_words
        if isinstance(weight, Tensor):
            # addmm moves a float32 weight in place and in one pass.
            plain = weight.dtype == torch.float32 and self.rest is None
            if plain or not (weight.is_contiguous() and WRITE.runs_on(weight)):
                return False
            WRITE(*self._operands(), weight, *numbers, *words)
            return True
        if not (WRITE_CODES.runs_on(weight.codes) and _fits_tiles(weight)):
            return False
        into = (weight.codes, weight.scales, weight.zeros)
        how = (weight.group, weight.noise is not None, weight.span_zero)
        WRITE_CODES(*self._operands(), *into, *numbers, *words, *how)
        return True

    def _operands(self) -> tuple[Tensor, Tensor, bool, Tensor | None, Tensor | None]:
        """(first, second or, across, its transpose, rest, its scales), all contiguous."""
        across = not self.second.is_contiguous()
        second = (self.second.T if across else self.second).contiguous()
        rest, factors = None, None
        if self.rest is not None:
            rest, factors = self.rest.full.contiguous(), self.rest.scales.contiguous()
        return self.first.contiguous(), second, across, rest, factors


def _fits_tiles(weight: GroupedWeight) -> bool:
    """Does every group lie in one row of one tile, with noise that the kernel makes?"""
    whole = TILE % weight.group == 0 and weight.shape[1] % weight.group == 0
    return whole and (weight.noise is None or weight.noise is uniform)
