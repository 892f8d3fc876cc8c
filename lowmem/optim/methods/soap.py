"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.slices import flat_slices
from lowmem.optim.formats import Format, State, format_named, number, tensor, turned
from lowmem.optim.method import ByRole, Needs
from lowmem.optim.methods.arguments import Beta, Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.projectors import lift_back, project, projects_right
from lowmem.optim.rules import Adam
from lowmem.optim.two_sided import orthonormal
from lowmem.optim.weights import Step

Side = Literal["left", "right"]
Rotated = Literal["both", "short", "hidden", "none"]


def soap(
    *,
    frequency: PositiveInt = 10,
    max_dim: PositiveInt = 10000,
    one_sided: bool = False,
    rotate_embeddings: bool = True,
    shampoo_beta: Beta | None = None,
    normalize: bool = False,
    betas: Betas = (0.95, 0.95),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
) -> ByRole:
    """SOAP: Adam in the eigenbasis of the gradient's two second-moment matrices.

        L <- bs L + (1 - bs) G G';  R <- bs R + (1 - bs) G'G;  every `frequency` updates
        Q_L, Q_R <- one power iteration of L and R
        W <- W - lr * Q_L Adam(Q_L' G Q_R) Q_R'

    The first gradient only starts L and R: no weight moves. Sides longer than max_dim are not
    rotated; one_sided rotates the shorter side alone, for much less memory. bs: shampoo_beta, b2
    unless given. normalize divides the step by its RMS. Embedding and head are rotated on their
    hidden side (rotate_embeddings), norms not at all. Moments may be bf16 or 8-bit, as Adam's may;
    L, R and the bases stay fp32: their small eigenvalues are what the method is about, and QR needs
    it.

    Source: Vyas et al. 2024, arXiv:2409.11321, Algorithm 3 and released code. State per matrix: two
    moments (m x n), L, Q_L (m x m), R, Q_R (n x n).
    """
    shampoo = betas[1] if shampoo_beta is None else shampoo_beta
    format = format_named(states, min_8bit)

    def rotating(sides: Rotated) -> Soap:
        return Soap(sides, max_dim, frequency, betas, shampoo, eps, normalize, format)

    embedding = rotating("hidden" if rotate_embeddings else "none")
    return ByRole(
        rotating("short" if one_sided else "both"), rotating("none"), embedding, embedding
    )


@dataclass(frozen=True)
class Soap:
    """One weight under SOAP; the other fields are the arguments of `soap`.

    sides: which dimensions are rotated; hidden is the second one. State: exp_avg and exp_avg_sq in
    the rotated coordinates, and for each rotated side left.factor and left.basis, or right.*.
    """

    sides: Rotated
    max_dim: int
    frequency: int
    betas: tuple[float, float]
    shampoo_beta: float
    eps: float
    normalize: bool
    format: Format

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=True, decay_first=False)

    @property
    def _adam(self) -> Adam:
        return Adam(self.betas, self.eps, "step", self.format)

    def init(self, weight: Tensor, place: Place) -> State:
        state: State = {"step": 0, "seed": place.seed, "since": 1}  # the first update is no step
        self._adam.init(state, weight, place)
        for side in self._rotated(weight.shape):
            length = weight.shape[side == "right"]
            for what in ("factor", "basis"):
                state[f"{side}.{what}"] = torch.zeros(length, length, device=weight.device)
        return state

    def _rotated(self, shape: torch.Size) -> list[Side]:
        short: Side = "right" if len(shape) == 2 and projects_right("std", shape) else "left"
        wanted: dict[Rotated, list[Side]] = {
            "both": ["left", "right"],
            "short": [short],
            "hidden": ["right"],
            "none": [],
        }
        return [side for side in wanted[self.sides] if shape[side == "right"] <= self.max_dim]

    def refresh(self, grad: Tensor, state: State) -> None:
        """Turn the bases after the factors, as the last update left them."""
        done = number(state, "step") - 1
        if done > 0 and done % self.frequency == 0:
            for side in _sides(state):
                self._turn(side, state)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Step | None:
        state["step"] = number(state, "step") + 1
        grad, sides = kept.float(), _sides(state)
        for side in sides:
            first, second = (grad.T, grad) if side == "right" else (grad, grad.T)
            factor = tensor(state, f"{side}.factor")
            factor.addmm_(first, second, beta=self.shampoo_beta, alpha=1 - self.shampoo_beta)
        if state["step"] == 1:
            for side in sides:
                tensor(state, f"{side}.basis").copy_(_eigenvectors(tensor(state, f"{side}.factor")))
            return None
        for side in sides:
            grad = project(grad, tensor(state, f"{side}.basis"), side == "right")
        return self._lifted(self._direction(grad, state), sides, state)

    def _direction(self, rotated: Tensor, state: State) -> Tensor:
        """Adam's direction, in place of the rotated gradient."""
        adam = self._adam.direction(rotated, state)
        flat = rotated.view(-1)
        for at in flat_slices(flat):
            flat[at] = adam.of(flat[at], at)
        if self.normalize:
            # The bases are orthogonal, so this is the RMS of the step itself.
            rotated.div_(rotated.square().mean().sqrt() + 1e-30)
        return rotated.mul_(adam.factor)

    def _lifted(self, direction: Tensor, sides: list[Side], state: State) -> Step:
        match sides:
            case ["left", "right"]:
                half = direction @ tensor(state, "right.basis").T
                return lift_back(half, tensor(state, "left.basis"), right=False)
            case [side]:
                return lift_back(direction, tensor(state, f"{side}.basis"), side == "right")

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            rows.add_(direction[start:stop], alpha=alpha)

        return step

    def _turn(self, side: Side, state: State) -> None:
        """One power iteration of a basis, columns ordered by their eigenvalues; moments follow."""
        basis = tensor(state, f"{side}.basis")
        power = tensor(state, f"{side}.factor") @ basis
        order = (basis * power).sum(dim=0).argsort(descending=True)
        new, usable = orthonormal(power[:, order])
        new = torch.where(usable, new, basis)
        order = torch.where(usable, order, torch.arange(len(order), device=order.device))
        turned(self.format, state, "exp_avg", new.T @ basis, side == "right")
        self._reorder(state, order, side)
        basis.copy_(new)

    def _reorder(self, state: State, order: Tensor, side: Side) -> None:
        """The second moment only changes places: it is one number per pair of eigenvectors."""
        like = tensor(state, "exp_avg_sq" if "exp_avg_sq" in state else "exp_avg_sq.codes")
        moment = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        flat = moment.view(-1)
        for at in flat_slices(flat):
            flat[at] = self.format.load(state, "exp_avg_sq", at)
        flat = moment.index_select(int(side == "right"), order).view(-1)
        for at in flat_slices(flat):
            target = self.format.load(state, "exp_avg_sq", at)
            target.copy_(flat[at])
            self.format.store(state, "exp_avg_sq", at, target)


def _sides(state: State) -> list[Side]:
    sides: tuple[Side, Side] = ("left", "right")
    return [side for side in sides if f"{side}.basis" in state]


def _eigenvectors(factor: Tensor) -> Tensor:
    """Of a symmetric matrix, the largest eigenvalue's first; the identity where it is not finite.

    The only decomposition of the whole run, and on a card the only wait for it.
    """
    usable = factor.isfinite().all()
    finite = torch.nan_to_num(factor, 0.0, 0.0, 0.0)
    try:
        vectors = torch.linalg.eigh(finite).eigenvectors
    except torch.linalg.LinAlgError:  # does not converge in float32
        vectors = torch.linalg.eigh(finite.double()).eigenvectors.float()
    return torch.where(usable, vectors.flip(1), torch.eye(len(factor), device=factor.device))


SPEC = MethodSpec(
    soap,
    {"any": {"lr": 3e-3, "frequency": 10}},
    "defaults of the released code of arXiv:2409.11321",
)
