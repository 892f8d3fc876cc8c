"""Natural GaLore: GaLore with the inverse of an empirical Fisher matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.blockwise import BLOCK
from lowmem.kernels.slices import flat_slices, pieces, slice_elements
from lowmem.optim.bases import Solver
from lowmem.optim.formats import (
    Format,
    State,
    fill_zero,
    format_named,
    is_float32,
    number,
    tensor,
)
from lowmem.optim.lifts import ProjectBack
from lowmem.optim.method import ByRole, Dense, Projected
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, Side
from lowmem.optim.refresh import Every
from lowmem.optim.rules import Adam, Direction
from lowmem.optim.two_sided import TwoSided

_SMALLEST_DAMPING = 1e-30  # where a relative damping meets a history of zeros
_JITTER = 1e-8  # of the largest diagonal entry, where the matrix is not positive definite


def natural_galore(
    *,
    rank: PositiveInt = 128,
    gap: PositiveInt = 200,
    scale: PositiveFloat = 0.25,
    two_sided: bool = True,
    side: Side = "std",
    history: PositiveInt = 8,
    lam: PositiveFloat = 1e-3,
    relative_lam: bool = False,
    noise: NonNegativeFloat = 1e-6,
    solver: Solver = "iteration",
    staggered: bool = True,
    on_refresh: Literal["keep", "clear", "reset", "rotate"] = "keep",
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-6,
    states: StateFormat = "fp32",
    history_states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Natural GaLore: Adam of a projected gradient divided by its empirical Fisher matrix.

    Every `gap` updates  A, B <- leading `rank` singular vectors of G on both sides
        R = A'G B, g = vec(R);  Q = the last `history` g;  u = (lam I + Q Q')^-1 g
        W <- W - lr * scale * A Adam(u) B'

    That is the released code; the paper projects one side alone, as GaLore does (two_sided = false,
    on `side`), and then the history takes more memory than full Adam. lam is absolute as released,
    so its effect depends on the gradient's size (the log's `damped`: 1 is no effect), or relative
    to the mean diagonal entry of Q Q'. At a refresh history and moments stay as they are
    (released), the history alone is cleared, both are (reset), or both are rotated. Entries of R
    below `noise` of its largest are taken as zero. As released: solver = "svd", staggered = false,
    history = 20, noise = 0. Embedding, head and norms follow plain Adam with the same eps.

    Source: Das 2024, arXiv:2410.16029, and its released code. State per matrix: A (m x r),
    B (n x r), two moments (r x r), history (h x r^2); one-sided: P (s x r), (r x b), (h x r b).
    """
    adam = Adam(betas, eps, "step", format_named(states, min_8bit, floor_codes))
    history_format = format_named(history_states, min_8bit)
    matrix = InNewBases(
        TwoSided(rank, solver) if two_sided else SVD(rank, side, solver),
        Natural(history, lam, relative_lam, noise, history_format, adam),
        ProjectBack(scale),
        Every(gap, staggered),
        on_refresh="reset" if on_refresh == "reset" else "keep",
        history_on_refresh="keep" if on_refresh == "reset" else on_refresh,
    )
    return ByRole(matrix, Dense(adam, decay_first=False))


@dataclass(frozen=True)
class Natural:
    """Adam of the natural gradient u = (lam I + Q Q')^-1 g; Q: the last h gradients, g included.

    As g is a column of Q, u = Q w with (lam I + Q'Q) w = e: one small system, and none of the
    cancellation of g/lam - Q z/lam^2. The Gram matrix Q'Q is kept in float64 and gets one new row
    and column per update.

    damping: lam; relative: in units of the mean diagonal entry of Q Q'. noise: entries of g below
    this share of its largest one are zero. At a refresh the projected gradient is diagonal, and the
    rounding noise beside the diagonal would be amplified by 1/lam and once more by Adam.

    State: history (h, elements rounded up to blocks of 256), gram (h, h), Adam's moments; for the
    log: damped, the share lam <g, u> / |g|^2 that is left of g.
    """

    history: int
    damping: float
    relative: bool
    noise: float
    format: Format
    then: Adam

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.then.init(state, like, place)
        # Rows of whole blocks, so that each can be loaded and stored by itself.
        width = -(-like.numel() // BLOCK) * BLOCK
        shown = torch.empty(1, device=like.device).expand(self.history, width)
        self.format.zeros(state, "history", shown, signed=True)
        square = (self.history, self.history)
        state["gram"] = torch.zeros(square, dtype=torch.float64, device=like.device)
        state["history_count"] = 0
        state["log.damped"] = torch.zeros((), device=like.device)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        natural = self._natural(gradient, state)
        adam = self.then.direction(natural, state)

        def of(piece: Tensor, at: slice) -> Tensor:
            return adam.of(natural[at], at)

        return Direction(of, adam.factor)

    def reset(self, state: State) -> None:
        self.then.reset(state)
        self.forget(state)

    def forget(self, state: State) -> None:
        """Clear the history alone."""
        fill_zero(state, "history")
        tensor(state, "gram").zero_()
        state["history_count"] = 0

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        self.then.rotate(state, transition, right)
        transition = transition.float()
        moment = tensor(state, "exp_avg" if "exp_avg" in state else "exp_avg.codes")
        for row in range(self.history):
            low = self._row(state, row)[: moment.numel()].view(moment.shape)
            low = low @ transition.T if right else transition @ low
            self._keep(low.reshape(-1), state, row)
        gram = tensor(state, "gram")
        for row in range(self.history):  # the transition is not orthogonal: lengths change
            gram[row] = self._products(self._row(state, row), state)

    def _natural(self, gradient: Tensor, state: State) -> Tensor:
        """u, flat and as long as a row; g takes the place of the oldest gradient."""
        g = self._padded(gradient, state)
        count = number(state, "history_count")
        state["history_count"] = count + 1
        newest = count % self.history
        self._keep(g, state, newest)

        # This update works with g itself, later ones with what the format has kept of it.
        gram = tensor(state, "gram")
        matrix, exact = gram.clone(), self._products(g, state)
        exact[newest] = torch.linalg.vector_norm(g, dtype=torch.float64).square()
        matrix[newest] = matrix[:, newest] = exact
        same = is_float32(state, "history")
        kept = exact if same else self._products(self._row(state, newest), state)
        gram[newest] = gram[:, newest] = kept

        lam = torch.full_like(exact[0], self.damping)
        if self.relative:
            lam = (lam * matrix.trace() / gradient.numel()).clamp(min=_SMALLEST_DAMPING)
        weights = _inverse_column(matrix, lam, newest)
        left = lam * (exact @ weights) / exact[newest]
        tensor(state, "log.damped").copy_(torch.where(exact[newest] > 0, left, 1.0))

        weights = weights.float()
        natural = g * weights[newest]
        weights[newest] = 0.0
        for rows, columns in self._blocks(state):
            natural[columns].addmv_(self._block(state, rows, columns).T, weights[rows])
        return natural

    def _padded(self, gradient: Tensor, state: State) -> Tensor:
        """The gradient without its noise, float32, as long as a row of the history."""
        g = torch.zeros(_shape(state)[1], device=gradient.device)
        flat = gradient.reshape(-1).float()
        sizes = flat.abs()
        noise = sizes < sizes.amax() * self.noise
        g[: flat.numel()] = flat.masked_fill(noise, 0.0)
        return g

    def _products(self, vector: Tensor, state: State) -> Tensor:
        """Q' vector, (h,) in float64: lam may be 1e-7 of these numbers."""
        products = torch.zeros(self.history, dtype=torch.float64, device=vector.device)
        for rows, columns in self._blocks(state):
            block = self._block(state, rows, columns).double()
            products[rows].addmv_(block, vector[columns].double())
        return products

    def _keep(self, vector: Tensor, state: State, row: int) -> None:
        """Store a vector as that row of the history."""
        offset = row * _shape(state)[1]
        for piece in flat_slices(vector):
            at = slice(offset + piece.start, offset + piece.stop)
            target = self.format.load(state, "history", at)
            target.copy_(vector[piece])
            self.format.store(state, "history", at, target)

    def _row(self, state: State, row: int) -> Tensor:
        return self._block(state, slice(row, row + 1), slice(0, _shape(state)[1])).view(-1)

    def _block(self, state: State, rows: slice, columns: slice) -> Tensor:
        """That part of the history, float32: one row, or whole rows."""
        width = _shape(state)[1]
        at = slice(rows.start * width + columns.start, (rows.stop - 1) * width + columns.stop)
        return self.format.load(state, "history", at).view(rows.stop - rows.start, -1)

    def _blocks(self, state: State) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of blocks that cover the history."""
        (height, width), history = _shape(state), _history(state)
        limit, on_meta = slice_elements(history), history.is_meta
        for top, bottom in pieces(height, max(1, limit // width), on_meta):
            for start, stop in pieces(width, min(width, limit), on_meta):
                yield slice(top, bottom), slice(start, stop)


def _history(state: State) -> Tensor:
    return tensor(state, "history" if "history" in state else "history.codes")


def _shape(state: State) -> tuple[int, int]:
    height, width = _history(state).shape
    return height, width


def _inverse_column(matrix: Tensor, lam: Tensor, column: int) -> Tensor:
    """Column of (matrix + lam I)^-1; matrix is consumed. Nothing waits for the device."""
    matrix.diagonal().add_(lam)
    unit = torch.zeros_like(matrix[:, :1])
    unit[column] = 1.0
    factor, info = torch.linalg.cholesky_ex(matrix)
    matrix.diagonal().add_(matrix.diagonal().amax() * _JITTER)
    safer, _ = torch.linalg.cholesky_ex(matrix)
    factor = torch.where(info == 0, factor, safer)
    return torch.cholesky_solve(unit, factor).squeeze(1)


@dataclass(frozen=True)
class InNewBases(Projected):
    """Projected, where a refresh may also clear or rotate the history.

    history_on_refresh "rotate" rotates the moments as well; "keep" leaves it to on_refresh.
    """

    rule: Natural
    history_on_refresh: Literal["keep", "clear", "rotate"] = "keep"

    def refresh(self, grad: Tensor, state: State) -> None:
        due = self.refresh_when.due(state)
        turns = due and self.history_on_refresh == "rotate" and number(state, "step") > 0
        old = [basis.clone().float() for basis, _ in self._bases(state)] if turns else []
        super().refresh(grad, state)
        if due and self.history_on_refresh == "clear":
            self.rule.forget(state)
        for before, (now, right) in zip(old, self._bases(state), strict=False):
            self.rule.rotate(state, now.float().T @ before, right)

    def _bases(self, state: State) -> list[tuple[Tensor, bool]]:
        if isinstance(self.projector, TwoSided):
            return self.projector.bases(state)
        return [(self.projector.basis(state), bool(state["right"]))]


SPEC = MethodSpec(
    natural_galore,
    {
        "60m": {
            "lr": 0.01,
            "weight_decay": 0.01,
            "rank": 128,
            "gap": 200,
            "scale": 0.25,
            "history": 20,
        },
        "130m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 0.25, "history": 20},
        "350m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 0.25, "history": 20},
        "1b": {"lr": 0.01, "rank": 512, "gap": 200, "scale": 0.25, "history": 20},
    },
    "arXiv:2410.16029, released scripts; rank at 1B from its table",
)
