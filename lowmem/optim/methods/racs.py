"""RACS: row and column scaled SGD."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.slices import row_slices
from lowmem.optim.formats import State, fill_zero, format_named, tensor
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Beta, Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction

_TINY = 1e-30  # instead of a division by zero


@dataclass(frozen=True)
class RowsAndColumns:
    """The rule of `racs`. For Dense: pieces must be whole rows.

    State: row_scale q (m,), column_scale s (n,), limited_norm phi, 0-dim; all float32.
    """

    beta: float
    growth: float
    iterations: int

    def init(self, state: State, like: Tensor, place: Place) -> None:
        state["row_scale"] = torch.zeros(like.shape[0], device=like.device)
        state["column_scale"] = torch.zeros(like.shape[1], device=like.device)
        state["limited_norm"] = torch.zeros((), device=like.device)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        width = gradient.shape[1]
        row_scale, column_scale = tensor(state, "row_scale"), tensor(state, "column_scale")
        rows, columns = principal_pair(gradient, self.iterations)
        row_scale.lerp_(rows, 1 - self.beta)
        column_scale.lerp_(columns, 1 - self.beta)
        by_row = row_scale.clamp(min=_TINY).rsqrt_()[:, None]
        by_column = column_scale.clamp(min=_TINY).rsqrt_()
        norm = torch.zeros((), device=gradient.device)
        for start, stop in row_slices(gradient):
            scaled = gradient[start:stop].float() * by_row[start:stop]
            norm += scaled.mul_(by_column).square_().sum()
        by_row = by_row * self._limiter(norm.sqrt_(), state)

        def of(piece: Tensor, at: slice) -> Tensor:
            lines = piece.view(-1, width) * by_row[at.start // width : at.stop // width]
            return lines.mul_(by_column).view(-1)

        return Direction(of)

    def _limiter(self, norm: Tensor, state: State) -> Tensor:
        """The factor that lets the norm grow by at most `growth`; 1 where there is no norm yet."""
        before = tensor(state, "limited_norm")
        # After a zero gradient phi is 0, and no norm would ever be allowed to grow from it.
        factor = torch.where(before > 0, (self.growth * before / norm).clamp(max=1.0), 1.0)
        factor = torch.where(norm > 0, factor, 1.0)
        before.copy_(torch.where(norm > 0, norm * factor, before))
        return factor

    def reset(self, state: State) -> None:
        fill_zero(state, "row_scale", "column_scale", "limited_norm")


def principal_pair(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(q, s), (m,) and (n,): q s' is nearly the best rank-1 approximation of G^2.

        from q = 1:  s = (G^2)' q / |q|^2;  q = G^2 s / |s|^2

    Each pass over the gradient serves the q of one iteration and the s of the next.
    """
    rows, columns = gradient.shape
    peak = torch.linalg.vector_norm(gradient, float("inf"), dtype=torch.float32).clamp_(min=_TINY)
    q = torch.ones(rows, device=gradient.device)
    s = torch.zeros(columns, device=gradient.device)
    for iteration in range(iterations + 1):
        sums, length = torch.zeros_like(s), s.square().sum().clamp_(min=_TINY)
        for start, stop in row_slices(gradient):
            # Squares of squares of a small gradient would underflow: it is divided by its peak.
            squares = (gradient[start:stop].float() / peak).square_()
            if iteration:
                torch.mv(squares, s, out=q[start:stop]).div_(length)
            if iteration < iterations:
                sums += q[start:stop] @ squares
        if iteration < iterations:
            s = sums / q.square().sum().clamp_(min=_TINY)
    return q, s * peak.square()


def racs(
    *,
    scale: PositiveFloat = 0.05,
    beta: Beta = 0.9,
    growth: Annotated[float, Field(ge=1.0)] = 1.01,
    iterations: PositiveInt = 5,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """RACS: SGD whose gradient is scaled by rows and columns; no moment is kept.

        q s' ~ G^2 by `iterations` of a fixed point;  averages q_k, s_k with beta, from 0
        U = Diag(q_k)^-1/2 G Diag(s_k)^-1/2, its norm limited to `growth` times the last one
        W <- (1 - lr wd) W - lr * scale * U

    Embedding, head and norms follow Adam at the same learning rate; `states` is their format.

    Source: Gong et al. 2025, arXiv:2502.07752, Algorithm 1 and equation 16. State per matrix
    (m x n): m + n + 1 numbers.
    """
    matrix = Dense(RowsAndColumns(beta, growth, iterations), multiplier=scale)
    return ByRole(
        matrix, Dense(Adam(betas, eps, "inside", format_named(states, min_8bit, floor_codes)))
    )


SPEC = MethodSpec(
    racs,
    {
        "60m": {"lr": 0.02, "scale": 0.05},
        "130m": {"lr": 0.02, "scale": 0.05},
        "350m": {"lr": 0.02, "scale": 0.05},
        "1b": {"lr": 0.02, "scale": 0.02},
    },
    "arXiv:2502.07752, Table 9",
)
