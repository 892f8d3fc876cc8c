"""Muon: momentum, orthogonalised."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.newton_schulz import DTYPES, Precision, newton_schulz
from lowmem.kernels.slices import flat_slices
from lowmem.optim.formats import Float32, Format, State, fill_zero, format_named, turned
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Beta, Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction

Adjustment = Literal["match_rms", "original", "spectral"]

_SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class Orthogonalised:
    """Newton-Schulz of the momentum.

        M <- mu M + (1 - mu) G;   U = (1 - mu) G + mu M (Nesterov) or M;   adj * NS(U)

    No scale of the gradient, so neither clipping nor a loss scale, has an effect.
    """

    momentum: float = 0.95
    nesterov: bool = True
    adjustment: Adjustment = "match_rms"
    precision: Precision = "bf16"
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.format.zeros(state, "exp_avg", like, signed=True)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        orthogonal = self._orthogonal(gradient, state).view(-1)

        def of(piece: Tensor, at: slice) -> Tensor:
            return orthogonal[at].float()

        return Direction(of, adjustment_of(self.adjustment, gradient.shape))

    def _orthogonal(self, gradient: Tensor, state: State) -> Tensor:
        """NS(U), in the dtype of its arithmetic."""
        mu = self.momentum
        ahead = torch.empty(
            gradient.shape, dtype=DTYPES[self.precision], device=gradient.device
        )  # U
        flat = gradient.view(-1)
        for at in flat_slices(gradient):
            piece = flat[at].float()
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg.lerp_(piece, 1 - mu)
            ahead.view(-1)[at] = piece.lerp(exp_avg, mu) if self.nesterov else exp_avg
            self.format.store(state, "exp_avg", at, exp_avg)
        norm = torch.linalg.vector_norm(ahead, dtype=torch.float32)
        return newton_schulz(ahead, norm.clamp(min=_SMALLEST_NORM))

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        turned(self.format, state, "exp_avg", transition, right)


def adjustment_of(kind: Adjustment, shape: torch.Size) -> float:
    """What the orthogonalised matrix (m, n) is multiplied by; its own RMS is 1/sqrt(max(m, n)).

    match_rms: 0.2 sqrt(max(m, n)), an RMS like that of AdamW's steps, so that AdamW's learning rate
    and decay fit (Liu et al., arXiv:2502.16982, section 2.2). original: sqrt(max(1, m/n)).
    spectral: sqrt(m/n).
    """
    rows, columns = shape
    match kind:
        case "match_rms":
            return 0.2 * math.sqrt(max(rows, columns))
        case "original":
            return math.sqrt(max(1.0, rows / columns))
        case "spectral":
            return math.sqrt(rows / columns)


def muon(
    *,
    momentum: Beta = 0.95,
    nesterov: bool = True,
    adjustment: Adjustment = "match_rms",
    newton_schulz: Precision = "bf16",
    rest_lr_ratio: PositiveFloat = 1.0,
    betas: Betas = (0.9, 0.95),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
) -> ByRole:
    """Muon: momentum whose singular values are all made about 1.

        M <- mu M + (1 - mu) G;  U = (1 - mu) G + mu M
        W <- (1 - lr wd) W - lr * adj * NS(U)

    adj is 0.2 sqrt(max(m, n)) (match_rms: AdamW's lr and decay fit), sqrt(max(1, m/n)) (original:
    lr about 0.02) or sqrt(m/n) (spectral): they differ by a factor of up to 9 at hidden size 2048,
    so a learning rate means nothing without its adjustment. Embedding, head and norms follow AdamW
    (betas, eps) at lr * rest_lr_ratio: 1 suits match_rms, about 0.015 the other two.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982.
    State per matrix: one momentum (m x n).
    """
    format = format_named(states, min_8bit)
    matrix = Orthogonalised(momentum, nesterov, adjustment, newton_schulz, format)
    return ByRole(
        Dense(matrix), Dense(Adam(betas, eps, "inside", format), multiplier=rest_lr_ratio)
    )


SPEC = MethodSpec(
    muon,
    {"1b": {"lr": 1e-3}, "7b": {"lr": 3e-4}},
    "AdamW's rates, which match_rms takes over (arXiv:2502.16982, section 2.2)",
)
