"""What turns a (projected) gradient into a direction of the same shape, with its own moments.

    direction = rule.direction(gradient, state)     # looks at the whole of it, if it must
    direction.of(piece, slice(0, 65536))            # the direction's elements, and new moments

Rules that several methods share stand here; one that a single method needs stands in its file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem.kernels.adam import add_adam_direction
from lowmem.kernels.adam8 import ADAM8, add_adam8_direction
from lowmem.kernels.slices import flat_slices
from lowmem.optim.formats import (
    Blockwise8,
    Float32,
    Format,
    State,
    fill_zero,
    is_float32,
    number,
    tensor,
    turned,
)
from lowmem.optim.place import Place


@dataclass(frozen=True)
class Direction:
    """factor * of(gradient piece, its place in the flattened gradient), before the learning rate.

    of: float32 (k,) -> float32 (k,). Called once per piece; pieces begin at multiples of 256. The
    gradient's piece is not changed, the result may be kept by nobody. added: the same in one pass,
    (target, piece, its place, alpha): target += alpha * of(piece); one of the two is called.
    one_pass: `added` takes no memory, however large the piece.
    """

    of: Callable[[Tensor, slice], Tensor]
    factor: float = 1.0
    added: Callable[[Tensor, Tensor, slice, float], None] | None = None
    one_pass: bool = False

    def add_to(self, target: Tensor, piece: Tensor, at: slice, alpha: float) -> None:
        """target (k,) += alpha * factor * of(piece)."""
        if self.added is not None:
            self.added(target, piece, at, alpha * self.factor)
        else:
            target.add_(self.of(piece, at), alpha=alpha * self.factor)


class Rule(Protocol):
    """by_rows: a rule may have it, true where `direction` looks at no value of the gradient and
    `of` at none outside its own rows: it is then shown and given a gradient in row slices."""

    def init(self, state: State, like: Tensor, place: Place) -> None:
        """Allocate the moments; `like` shows shape and device of the gradients to come."""

    def direction(self, gradient: Tensor, state: State) -> Direction | None:
        """What to do with this gradient; None: the weight stays, without decay.

        state["step"] is the number of this update, from 1.
        """

    def reset(self, state: State) -> None:
        """Forget the moments."""


@runtime_checkable
class SurveyingRule(Protocol):
    """A rule that may need only sums over all rows to treat each by itself."""

    @property
    def surveys(self) -> bool:
        """Does it?"""

    def survey(self, rows: Tensor, so_far: Tensor | None) -> Tensor:
        """Those sums with these rows; so_far: of the rows before them, may be changed."""

    def surveyed(self, survey: Tensor, rows: int) -> Direction:
        """What to do with a gradient of so many rows; bit for bit that of the whole one."""


class SubspaceRule(Rule, Protocol):
    """A rule that also makes sense of a projected gradient, where rows or heads mean nothing."""

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        """Express the moments in a new basis. transition: P_new' P_old, (r, r)."""


def whole(rule: Rule, gradient: Tensor, state: State) -> tuple[Tensor, float]:
    """(direction, factor) of a small gradient at once; a rule that pauses gives zeros."""
    direction = rule.direction(gradient, state)
    if direction is None:
        return torch.zeros_like(gradient), 0.0
    flat = gradient.reshape(-1)
    result = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
    for piece in flat_slices(flat):
        target = result.view(-1)[piece]
        if direction.added is not None:
            direction.added(target, flat[piece].float(), piece, 1.0)
        else:
            target.copy_(direction.of(flat[piece].float(), piece))
    return result, direction.factor


def _alone(
    added: Callable[[Tensor, Tensor, slice, float], None], piece: Tensor, at: slice
) -> Tensor:
    result = torch.zeros_like(piece)
    added(result, piece, at, 1.0)
    return result


def age(state: State) -> int:
    """Updates since the moments were last forgotten, this one included: k of bias correction."""
    since = state.get("since", 0)
    assert isinstance(since, int)
    return number(state, "step") - since


@dataclass(frozen=True)
class Adam:
    """Adam with one of its two bias corrections; k counts the updates from 1.

        M <- b1 M + (1 - b1) R;   V <- b2 V + (1 - b2) R^2
        bias "inside":  M/(1 - b1^k) / (sqrt(V/(1 - b2^k)) + eps)
        bias "step":    M / (sqrt(V) + eps),  and  sqrt(1 - b2^k) / (1 - b1^k)  as factor
        bias "off":     M / (sqrt(V) + eps)

    Source: Kingma & Ba, arXiv:1412.6980, Algorithm 1 ("inside") and the end of its section 2
    ("step", where eps is relative to the uncorrected V).
    """

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias: Literal["inside", "step", "off"] = "inside"
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.format.zeros(state, "exp_avg", like, signed=True)
        self.format.zeros(state, "exp_avg_sq", like, signed=False)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        (first, second), k = self.betas, age(state)
        correction1, correction2 = 1 - first**k, 1 - second**k
        factor = 1.0 if self.bias == "off" else math.sqrt(correction2) / correction1
        # eps after the correction of V is a smaller eps before it.
        eps = self.eps * math.sqrt(correction2) if self.bias == "inside" else self.eps
        inside, outside = (factor, 1.0) if self.bias == "inside" else (1.0, factor)

        def added(target: Tensor, piece: Tensor, at: slice, alpha: float) -> None:
            moments = (tensor(state, key).view(-1)[at] for key in ("exp_avg", "exp_avg_sq"))
            add_adam_direction(
                target, piece, *moments, alpha=alpha * inside, betas=self.betas, eps=eps
            )

        def added8(target: Tensor, piece: Tensor, at: slice, alpha: float) -> None:
            assert isinstance(self.format, Blockwise8)
            add_adam8_direction(
                target,
                piece,
                self.format.codes(state, "exp_avg", at),
                self.format.codes(state, "exp_avg_sq", at),
                alpha=alpha,
                scale=inside,
                betas=self.betas,
                eps=eps,
                floor_codes=self.format.floor_codes,
            )

        if is_float32(state, "exp_avg"):
            return Direction(lambda piece, at: _alone(added, piece, at), outside, added, True)
        if isinstance(self.format, Blockwise8):
            in_kernel = ADAM8.runs_on(gradient)
            return Direction(
                lambda piece, at: _alone(added8, piece, at), outside, added8, in_kernel
            )

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg_sq = self.format.load(state, "exp_avg_sq", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            exp_avg_sq.mul_(second).addcmul_(piece, piece, value=1 - second)
            moved = exp_avg_sq.sqrt().add_(eps)
            torch.div(exp_avg, moved, out=moved)
            self.format.store(state, "exp_avg", at, exp_avg)
            self.format.store(state, "exp_avg_sq", at, exp_avg_sq)
            return moved if inside == 1.0 else moved.mul_(inside)

        return Direction(of, outside)

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg", "exp_avg_sq")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        turned(self.format, state, "exp_avg", transition, right)
        # The second moment of a sum of independent parts: squares of the coefficients.
        turned(self.format, state, "exp_avg_sq", transition.square(), right)


@dataclass(frozen=True)
class Lion:
    """The sign of an interpolated momentum.

        U = sign(b1 M + (1 - b1) R);   then  M <- b2 M + (1 - b2) R

    Source: Chen et al., arXiv:2302.06675, Algorithm 2.
    """

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float] = (0.9, 0.99)
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self.format.zeros(state, "exp_avg", like, signed=True)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        first, second = self.betas

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            moved = (exp_avg * first).add_(piece, alpha=1 - first).sign_()
            exp_avg.mul_(second).add_(piece, alpha=1 - second)
            self.format.store(state, "exp_avg", at, exp_avg)
            return moved

        return Direction(of)

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        turned(self.format, state, "exp_avg", transition, right)


@dataclass(frozen=True)
class Sgd:
    """Gradient descent with momentum: the plain one keeps no state.

        B <- mu B + (1 - damp) R (the first time B = R);   U = R + mu B (Nesterov) or B

    sign: take the sign of U. Source: Sutskever et al., ICML 2013; torch.optim.SGD for the forms.
    """

    by_rows: ClassVar[bool] = True
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    sign: bool = False
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        if self.momentum:
            self.format.zeros(state, "exp_avg", like, signed=True)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        weight = 1.0 if age(state) == 1 else 1 - self.dampening

        def of(piece: Tensor, at: slice) -> Tensor:
            if not self.momentum:
                return piece.sign() if self.sign else piece
            buffer = self.format.load(state, "exp_avg", at)
            buffer.mul_(self.momentum).add_(piece, alpha=weight)
            moved = piece.add(buffer, alpha=self.momentum) if self.nesterov else buffer.clone()
            self.format.store(state, "exp_avg", at, buffer)
            return moved.sign_() if self.sign else moved

        return Direction(of)

    def reset(self, state: State) -> None:
        if self.momentum:
            fill_zero(state, "exp_avg")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        if self.momentum:
            turned(self.format, state, "exp_avg", transition, right)
