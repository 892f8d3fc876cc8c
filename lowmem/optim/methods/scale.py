"""SCALE: SGD on gradients normalised per output, with momentum on the head alone."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.linear_cross_entropy import row_slices as vocabulary_slices
from lowmem.optim.formats import Float32, Format, State, fill_zero, format_named
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Beta, Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction

_SMALLEST = 1e-8  # of a root mean square, as released


@dataclass(frozen=True)
class Normalised:
    """The gradient, or its average, with a root mean square of 1 per output.

    outputs: the dimension of a weight (m, n) that counts them: 0 for linear layers, 1 for the
    embedding, whose rows are inputs. momentum: 0 keeps no state; else only for outputs = 0. For
    Dense: pieces must be whole rows.
    """

    outputs: Literal[0, 1] = 0
    momentum: float = 0.0
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    @property
    def by_rows(self) -> bool:
        """Rows are normalised by themselves, columns by sums over all rows."""
        return self.outputs == 0

    @property
    def surveys(self) -> bool:
        return self.outputs == 1

    def init(self, state: State, like: Tensor, place: Place) -> None:
        if self.momentum:
            self.format.zeros(state, "exp_avg", like, signed=True)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        rows, width = gradient.shape
        if self.outputs == 1:
            squares: Tensor | None = None
            for start, stop in vocabulary_slices(rows):  # in the slices in which it may arrive
                squares = self.survey(gradient[start:stop], squares)
            assert squares is not None
            return self.surveyed(squares, rows)

        def of(piece: Tensor, at: slice) -> Tensor:
            if self.momentum:
                exp_avg = self.format.load(state, "exp_avg", at)
                piece = exp_avg.lerp_(piece, 1 - self.momentum)
            lines = piece.view(-1, width)
            length = torch.linalg.vector_norm(lines, dim=1, keepdim=True)
            moved = lines / length.mul_(width**-0.5).clamp_(min=_SMALLEST)
            if self.momentum:
                self.format.store(state, "exp_avg", at, exp_avg)
            return moved.view(-1)

        return Direction(of)

    def survey(self, rows: Tensor, so_far: Tensor | None) -> Tensor:
        """Sums of squares by column, (n), float32."""
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square_()
        return squares if so_far is None else so_far.add_(squares)

    def surveyed(self, survey: Tensor, rows: int) -> Direction:
        columns = survey.div_(rows).sqrt_().clamp_(min=_SMALLEST)
        width = len(columns)
        return Direction(lambda piece, at: (piece.view(-1, width) / columns).view(-1))

    def reset(self, state: State) -> None:
        if self.momentum:
            fill_zero(state, "exp_avg")


def scale(
    *,
    momentum: Beta = 0.9,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    adam_multiplier: PositiveFloat = 1.0,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """SCALE: column-normalised SGD with last-layer momentum; next to no optimizer state.

        M = G; head: M <- mu M + (1 - mu) G;   W <- (1 - lr wd) W - lr * M / rms(M per output)

    The paper's column is what belongs to one output: a row of a linear layer's (out, in) weight,
    a column of the embedding's (token, hidden) one. As released, it is divided by its root mean
    square; the paper's Euclidean norm would need sqrt(n) times the learning rate. Norms follow
    Adam at `adam_multiplier` times the learning rate.

    Source: Glentis et al. 2025, arXiv:2506.16659, Algorithm 1. State: one moment of the head, two
    of the norms.
    """
    form = format_named(states, min_8bit, floor_codes)
    return ByRole(
        matrix=Dense(Normalised()),
        other=Dense(Adam(betas, eps, "inside", form), multiplier=adam_multiplier),
        embedding=Dense(Normalised(outputs=1)),
        head=Dense(Normalised(momentum=momentum, format=form)),
    )


SPEC = MethodSpec(
    scale,
    {
        "60m": {"lr": 1e-3},
        "130m": {"lr": 1e-3},
        "350m": {"lr": 1e-3},
        "1b": {"lr": 2e-4, "adam_multiplier": 5.0},
        "7b": {"lr": 1e-4, "adam_multiplier": 10.0},
    },
    "arXiv:2506.16659, released scripts",
)
