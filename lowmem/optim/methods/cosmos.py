"""COSMOS: SOAP in the gradient's leading eigen-subspace, Muon outside it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.newton_schulz import DTYPES, Precision, newton_schulz
from lowmem.kernels.slices import flat_slices
from lowmem.optim.bases import Basis, Solver
from lowmem.optim.formats import Format, State, format_named, number, tensor
from lowmem.optim.method import ByRole, Dense, Needs
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.projectors import Side, project, projects_right
from lowmem.optim.rules import Adam
from lowmem.optim.two_sided import basis_of_side, orthonormal
from lowmem.optim.weights import Step

MomentumForm = Literal["nesterov", "average"]

_NORM_EPS = 1e-7  # of Newton-Schulz
_NOISE = 1e-5  # a remainder below this share of the momentum is rounding, not direction


def cosmos(
    *,
    rank: PositiveInt = 64,
    ratio: PositiveFloat = 0.2,
    gamma: NonNegativeFloat = 0.2,
    momentum_form: MomentumForm = "nesterov",
    side: Side = "right",
    solver: Solver = "iteration",
    newton_schulz: Precision = "bf16",
    betas: Betas = (0.95, 0.95),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
) -> ByRole:
    """COSMOS: SOAP on the leading eigenvectors of E[G'G], Muon on the rest.

        M <- b1 M + G;  H = (G + b1 M) / sum of its weights      (nesterov; average: the paper's)
        P, S <- one power iteration of b2 P S P' + (1 - b2) G'G;  V <- b2 V + (1 - b2) (G P)^2
        D = [H P / (sqrt(V') + eps)] P' + gamma * unit RMS of NS(H - H P P')
        W <- (1 - lr wd) W - lr * ratio * unit RMS of D

    So every step has RMS lr * ratio whatever the gradient's size: clipping does nothing, and lr is
    that of embedding, head and norms, which follow AdamW with the same betas. The basis lies on the
    input side as published (side = "right"; "std" takes the shorter one, which is smaller for wide
    matrices). solver: of the very first basis only; "eigh" is exact. A rank that is not below both
    sides leaves Muon alone. P, S and V stay fp32: they are thin, and QR needs it.

    Source: Liu et al. 2025, arXiv:2502.17410 (average), and released code (nesterov).
    State per matrix: momentum (m x n), P (n x r), S (r x r), V (m x r).
    """
    format = format_named(states, min_8bit)
    matrix = Cosmos(
        rank, ratio, gamma, momentum_form, side, solver, newton_schulz, betas, eps, format
    )
    return ByRole(matrix, Dense(Adam(betas, eps, "inside", format)))


@dataclass(frozen=True)
class Cosmos:
    """The treatment of matrices; the fields are the arguments of `cosmos`.

    State: exp_avg (m, n); unless the rank reaches a side: right = 1 if the basis is on the second
    dimension, basis (s, r), gram (r, r), exp_avg_sq of the projected gradient's shape; for the
    log: energy |G P|^2 / |G|^2, and kept_bases: updates whose basis came out unusable.
    """

    rank: int
    ratio: float
    gamma: float
    momentum_form: MomentumForm
    side: Side
    solver: Solver
    precision: Precision
    betas: tuple[float, float]
    eps: float
    format: Format

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=True, decay_first=True)

    def init(self, weight: Tensor, place: Place) -> State:
        state: State = {"step": 0, "seed": place.seed}
        self.format.zeros(state, "exp_avg", weight, signed=True)
        if self.rank >= min(weight.shape):
            return state
        right = projects_right(self.side, weight.shape)
        state["right"] = int(right)
        rows, columns = weight.shape
        low = (rows, self.rank) if right else (self.rank, columns)
        shapes = {
            "basis": (columns if right else rows, self.rank),
            "gram": (self.rank, self.rank),
            "exp_avg_sq": low,
            "log.energy": (),
            "log.kept_bases": (),
        }
        for key, shape in shapes.items():
            state[key] = torch.zeros(shape, device=weight.device)
        return state

    def refresh(self, grad: Tensor, state: State) -> None:
        """The basis moves in every update, with the whole gradient."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Step:
        state["step"] = number(state, "step") + 1
        full = kept.float()
        if "basis" in state:
            self._follow(full, state)
        self._momentum(full, state)
        direction = self._direction(full, state)
        norm = torch.linalg.vector_norm(direction)
        direction.mul_(self.ratio * math.sqrt(direction.numel()) / (norm + self.eps))

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            rows.add_(direction[start:stop], alpha=alpha)

        return step

    def _follow(self, grad: Tensor, state: State) -> None:
        """Move P, S and V with this gradient; P and S stay where it is not finite."""
        second, right = self.betas[1], bool(state["right"])
        basis, gram = tensor(state, "basis"), tensor(state, "gram")
        new, usable = self._basis(grad, state)
        turn = basis.T @ new
        carried = turn.T @ gram @ turn  # zero the first time
        basis.copy_(torch.where(usable, new, basis))
        low = project(grad, basis, right)
        product = low.T @ low if right else low @ low.T
        torch.where(usable, carried.mul_(second).add_(product, alpha=1 - second), gram, out=gram)
        tensor(state, "exp_avg_sq").mul_(second).addcmul_(low, low, value=1 - second)
        norms = torch.linalg.vector_norm(low), torch.linalg.vector_norm(grad)
        tensor(state, "log.energy").copy_((norms[0] / norms[1]).square())
        tensor(state, "log.kept_bases").add_(usable.logical_not())

    def _basis(self, grad: Tensor, state: State) -> Basis:
        """The leading singular vectors the first time; then one power iteration."""
        old, right, second = tensor(state, "basis"), bool(state["right"]), self.betas[1]
        if number(state, "step") == 1:
            return basis_of_side(grad, right, self.rank, self.solver, number(state, "seed"))
        low = project(grad, old, right)
        power = grad.T @ low if right else grad @ low.T
        power.mul_(1 - second).addmm_(old, tensor(state, "gram"), alpha=second)
        return orthonormal(power)

    def _momentum(self, full: Tensor, state: State) -> None:
        """Advance the momentum, and put H in place of the gradient."""
        first, k = self.betas[0], number(state, "step")
        weights = (1 - first**k) / (1 - first)  # of the gradients in M, summed
        nesterov = self.momentum_form == "nesterov"
        flat = full.view(-1)
        for at in flat_slices(flat):
            exp_avg = self.format.load(state, "exp_avg", at)
            if nesterov:
                exp_avg.mul_(first).add_(flat[at])
                flat[at].add_(exp_avg, alpha=first).div_(1 + first * weights)
            else:
                exp_avg.mul_(first).add_(flat[at], alpha=1 - first)
                torch.div(exp_avg, 1 - first**k, out=flat[at])
            self.format.store(state, "exp_avg", at, exp_avg)

    def _direction(self, full: Tensor, state: State) -> Tensor:
        """D, in place of H."""
        if "basis" not in state:
            return full.copy_(self._orthogonal(full))
        basis, right = tensor(state, "basis"), bool(state["right"])
        low = project(full, basis, right)
        before = torch.linalg.vector_norm(full)
        rest = _add_lifted(full, low, basis, right, -1.0)
        heard = torch.linalg.vector_norm(rest) > before * _NOISE
        orthogonal = self._orthogonal(rest)
        norm = torch.linalg.vector_norm(orthogonal, dtype=torch.float32)
        share = self.gamma * math.sqrt(full.numel()) / (norm + self.eps)
        direction = full.copy_(orthogonal).mul_(torch.where(heard, share, 0.0))
        second_correction = math.sqrt(1 - self.betas[1] ** number(state, "step"))
        low.div_(tensor(state, "exp_avg_sq").sqrt().div_(second_correction).add_(self.eps))
        return _add_lifted(direction, low, basis, right, 1.0)

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """NS5, in the dtype of its arithmetic; matrix is consumed."""
        norm = torch.linalg.vector_norm(matrix) + _NORM_EPS
        return newton_schulz(matrix.to(DTYPES[self.precision]), norm)


def _add_lifted(full: Tensor, low: Tensor, basis: Tensor, right: bool, alpha: float) -> Tensor:
    """full += alpha * low mapped back, in place."""
    first, second = (low, basis.T) if right else (basis, low)
    return full.addmm_(first, second, alpha=alpha)


SPEC = MethodSpec(
    cosmos,
    {"any": {"lr": 2e-3, "weight_decay": 0.1, "rank": 64, "ratio": 0.2, "gamma": 0.2}},
    "recommendation of the released code, 2026; rank as in arXiv:2502.17410",
)
