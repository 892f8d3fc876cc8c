"""Magma: any method, with random updates left out and the others weighed by their alignment."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from lowmem.errors import ConfigError
from lowmem.kernels.slices import flat_slices
from lowmem.naming import seed_of
from lowmem.optim.formats import Format, State, number, tensor
from lowmem.optim.method import ByRole, Dense, Method, Needs, Projected
from lowmem.optim.methods.adabelief import AdaBelief
from lowmem.optim.methods.adam_mini import AdamMini
from lowmem.optim.methods.arguments import Beta
from lowmem.optim.methods.diffgrad import DiffGrad
from lowmem.optim.methods.exadam import ExAdam
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction, Rule, SubspaceRule
from lowmem.optim.weights import Step

_ALIGNMENT = "log.alignment"
_WITH_MOMENT = (Adam, AdaBelief, AdamMini, DiffGrad, ExAdam)


@dataclass(frozen=True)
class Aligned:
    """A rule that also notes how well its first moment agrees with the gradient it is given.

    In a subspace that is the projected gradient, so nothing of full size is kept for it. first:
    the decay of the moment. State: the smoothed alignment, 0-dim, from 1.
    """

    rule: Rule
    first: float
    format: Format
    temperature: float
    smoothing: float

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.rule.init(state, like, place)
        state[_ALIGNMENT] = torch.ones((), device=like.device)

    def direction(self, gradient: Tensor, state: State) -> Direction | None:
        target = torch.sigmoid(self._cosine(gradient, state) / self.temperature)
        alignment = tensor(state, _ALIGNMENT)
        # A gradient that is not finite has no say.
        target = torch.where(target.isfinite(), target, alignment)
        alignment.lerp_(target, 1 - self.smoothing)
        return self.rule.direction(gradient, state)

    def _cosine(self, gradient: Tensor, state: State) -> Tensor:
        """Of the angle between the moment after this update and the gradient; 0 if one is 0."""
        flat, zero = gradient.reshape(-1), torch.zeros((), device=gradient.device)
        both, moments, gradients = zero.clone(), zero.clone(), zero.clone()
        for at in flat_slices(flat):
            piece = flat[at].float()
            moment = self.format.load(state, "exp_avg", at).lerp(piece, 1 - self.first)
            both += torch.dot(moment, piece)
            moments += torch.dot(moment, moment)
            gradients += torch.dot(piece, piece)
        length = moments.sqrt_().mul_(gradients.sqrt_())
        return torch.where(length == 0, 0.0, both / length)

    def reset(self, state: State) -> None:
        self.rule.reset(state)


@dataclass(frozen=True)
class AlignedInSubspace(Aligned):
    """The same for a rule that may be rotated into a new basis."""

    rule: SubspaceRule

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        self.rule.rotate(state, transition, right)


@dataclass(frozen=True)
class Masked:
    """A method whose step is left out at random, and otherwise multiplied by the alignment."""

    inner: Dense | Projected
    survival: float

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def init(self, weight: Tensor, place: Place) -> State:
        return self.inner.init(weight, place)

    def refresh(self, grad: Tensor, state: State) -> None:
        self.inner.refresh(grad, state)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return self.inner.compress(grad, state)

    def update(self, kept: Tensor, state: State) -> Step | None:
        step = self.inner.update(kept, state)
        if step is None:
            return None
        alignment = tensor(state, _ALIGNMENT)
        survives = self.survives(number(state, "seed"), number(state, "step"))

        def masked(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            # Also where it is left out: the moments of a dense rule move in its step.
            moved = torch.zeros_like(rows)
            step(moved, start, stop, alpha)
            if survives:
                rows.addcmul_(moved, alignment)

        return masked

    def survives(self, seed: int, update: int) -> bool:
        """Is this weight moved in this update? Known to the host, equal in every mode and run."""
        return seed_of(seed, "mask", update) < self.survival * 2**63


def behind_mask(method: Method, survival: float, temperature: float, smoothing: float) -> Masked:
    """`method` with the mask before its steps. TypeError if it is not one of `can_wrap`."""
    if isinstance(method, Projected) and isinstance(method.rule, Adam):
        inside = method.rule
        low = AlignedInSubspace(inside, inside.betas[0], inside.format, temperature, smoothing)
        return Masked(replace(method, rule=low), survival)
    if isinstance(method, Dense) and isinstance(method.rule, _WITH_MOMENT):
        rule = method.rule
        dense = Aligned(rule, rule.betas[0], rule.format, temperature, smoothing)
        return Masked(replace(method, rule=dense), survival)
    raise TypeError(f"{type(method).__name__} has no first moment to compare gradients with")


def can_wrap(method: Method) -> bool:
    """Has it a rule whose exp_avg is M <- b1 M + (1 - b1) G, of the gradient or its projection?"""
    if isinstance(method, Projected):
        return isinstance(method.rule, Adam)
    return isinstance(method, Dense) and isinstance(method.rule, _WITH_MOMENT)


def magma(
    *,
    base: str = "adamw",
    base_options: dict[str, Any] | None = None,
    survival: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5,
    temperature: PositiveFloat = 2.0,
    smoothing: Beta = 0.9,
) -> ByRole:
    """Magma: momentum-aligned gradient masking around another method.

        s <- 0.9 s + 0.1 sigmoid(cos(M, G) / temperature);   z = 1 with probability `survival`, or 0
        W <- (1 - lr wd) W - lr * z * s * (step of `base`)

    One z and s per matrix; the moments of the base advance in every update. Over a method that
    projects, M and G are those of the subspace. Attention and MLP matrices are masked; embedding,
    head and norms follow the base as it is. Decay is not masked. The paper does not say where s
    begins; here at 1. base: a method whose matrices follow Adam or a relative of it; base_options:
    its arguments.

    Source: Joo et al. 2026, arXiv:2602.15322, Algorithm 1. State: the base's and one number.
    """
    # The list of methods holds this one too.
    from lowmem.optim.methods import METHODS, build_method

    inner = build_method(base, base_options or {}, "optimizer.base")
    if not can_wrap(inner.matrix):
        suitable = [name for name in METHODS if can_wrap(build_method(name, {}).matrix)]
        raise ConfigError(
            f"optimizer.base = {base!r} does not suit method 'magma'",
            "its matrices keep no average of the gradient that could be compared with the gradient",
            "choose one of: " + ", ".join(suitable),
        )
    return replace(inner, matrix=behind_mask(inner.matrix, survival, temperature, smoothing))


SPEC = MethodSpec(
    magma,
    {"any": {"lr": 1e-3}},
    "as adamw; the paper's grid of learning rates is not confirmed",
    why_states="moments belong to the base: base_options.states",
)
