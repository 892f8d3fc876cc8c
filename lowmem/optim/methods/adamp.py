"""AdamP: Adam that does not lengthen weights whose scale has no effect."""

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import Float32, Format, State, format_named, number, tensor
from lowmem.optim.method import ByRole, Dense, Needs
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam
from lowmem.optim.weights import DependentStep, RowGroups, Step

_PROJECTED = "log.projected"


@dataclass(frozen=True)
class AdamP:
    """A method of its own, because its step depends on the weight.

    The radial part of a layer is known only at its end, so Adam's direction is computed twice:
    for this sum, and again in the step, which keeps the new moments.
    """

    betas: tuple[float, float]
    eps: float
    delta: float
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=True, decay_first=True)

    def init(self, weight: Tensor, place: Place) -> State:
        state: State = {"step": 0, "seed": place.seed}
        Adam(format=self.format).init(state, weight, place)
        state[_PROJECTED] = torch.zeros((), device=weight.device)
        return state

    def refresh(self, grad: Tensor, state: State) -> None:
        """No subspace."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Step:
        state["step"] = number(state, "step") + 1
        width, device = kept.shape[1], kept.device
        radial = torch.zeros((), device=device)
        # Of each row of the weight: its length, and that of its gradient, and their product.
        lengths, steepness, products = (torch.zeros(kept.shape[0], device=device) for _ in range(3))
        layer_share = torch.zeros_like(lengths)
        channel = torch.zeros((), dtype=torch.bool, device=device)

        def look(groups: RowGroups) -> None:
            for rows, start, stop in groups:
                grads = kept[start:stop].float()
                lengths[start:stop] = torch.linalg.vector_norm(rows, dim=1)
                steepness[start:stop] = torch.linalg.vector_norm(grads, dim=1)
                products[start:stop] = (rows * grads).sum(dim=1)
                moved = self._adam(grads, state, start, keep=False)
                radial.add_(moved.mul_(rows).sum())
            cosines = _cosine(products, lengths, steepness, self.eps)
            whole = torch.linalg.vector_norm(lengths)
            cosine = _cosine(products.sum(), whole, torch.linalg.vector_norm(steepness), self.eps)
            channel.copy_(cosines.amax() < self.delta / math.sqrt(width))
            layer = cosine < self.delta / math.sqrt(kept.numel())
            unit = whole + self.eps
            layer_share.copy_(torch.where(layer, lengths / unit * (radial / unit), 0.0))
            tensor(state, _PROJECTED).copy_(channel | layer)

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            moved = self._adam(kept[start:stop].float(), state, start, keep=True)
            # Decay has changed the rows' length, but not their direction.
            units = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + self.eps)
            own = (units * moved).sum(dim=1)
            away = torch.where(channel, own, layer_share[start:stop])
            rows.add_(moved.addcmul_(units, away[:, None], value=-1), alpha=alpha)

        return DependentStep(look, step)

    def _adam(self, grads: Tensor, state: State, start: int, keep: bool) -> Tensor:
        """Adam's direction for the rows from `start`; keep: and the new moments."""
        (first, second), k = self.betas, number(state, "step")
        at = slice(start * grads.shape[1], start * grads.shape[1] + grads.numel())
        piece = grads.view(-1)
        exp_avg = self.format.load(state, "exp_avg", at)
        exp_avg_sq = self.format.load(state, "exp_avg_sq", at)
        if not keep:
            exp_avg, exp_avg_sq = exp_avg.clone(), exp_avg_sq.clone()
        exp_avg.mul_(first).add_(piece, alpha=1 - first)
        exp_avg_sq.mul_(second).addcmul_(piece, piece, value=1 - second)
        moved = exp_avg_sq.sqrt().div_(math.sqrt(1 - second**k)).add_(self.eps)
        torch.div(exp_avg, moved, out=moved).div_(1 - first**k)
        if keep:
            self.format.store(state, "exp_avg", at, exp_avg)
            self.format.store(state, "exp_avg_sq", at, exp_avg_sq)
        return moved.view(grads.shape)


def _cosine(product: Tensor, first: Tensor, second: Tensor, eps: float) -> Tensor:
    """|cos| from an inner product and two lengths; 0 if one of them is 0."""
    return product.abs() / (first.clamp(min=eps) * second.clamp(min=eps))


def adamp(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    delta: NonNegativeFloat = 0.1,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """AdamP: the part of Adam's step along the weight is removed where it only slows down.

        U = Adam(G);   where |cos(w, g)| < delta / sqrt(dim w):  u <- u - w (w.u) / |w|^2
        W <- (1 - lr wd) W - lr * U

    w is every row if all rows pass the test, else the whole matrix if that does, else nothing is
    removed. Norms are plain Adam. The released code also weakens the decay of what it projects
    (wd_ratio); here it is the same everywhere.

    Source: Heo et al. 2021, arXiv:2006.08217, Algorithm 2 and released code. State: two moments of
    the weight's shape.
    """
    form = format_named(states, min_8bit, floor_codes)
    matrix = AdamP(betas, eps, delta, form)
    return ByRole(matrix, Dense(Adam(betas, eps, "inside", form)), matrix, matrix)


SPEC = MethodSpec(
    adamp, {"any": {"lr": 1e-3}}, "arXiv:2006.08217, default; nothing published at these sizes"
)
