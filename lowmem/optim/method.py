"""How one weight is updated: the Method protocol and its two standard forms.

    Dense(Adam())                                               AdamW
    Projected(SVD(128), Adam(), ProjectBack(0.25), Every(200))  GaLore

A method is frozen; all that varies lives in `state`, a flat dict of tensors and numbers. Four
calls, because `refresh` is rare and expensive, `compress` is per micro-batch, `update` per step,
and because `compress` is linear: sums, means and clipping act on what it returns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem.optim.formats import State, number
from lowmem.optim.lifts import Lift, Normed
from lowmem.optim.place import Place
from lowmem.optim.projectors import Norming, Projector
from lowmem.optim.refresh import Refresh
from lowmem.optim.rules import Direction, Rule, SubspaceRule, SurveyingRule, whole
from lowmem.optim.weights import OnePassStep, Step

OnRefresh = Literal["keep", "reset", "rotate"]
Curvature = Literal["none", "gauss-newton", "hutchinson"]


@dataclass(frozen=True)
class Needs:
    """What a method asks of the optimizer.

    full_gradient: it cannot accumulate in a subspace. decay_first: weight decay before the step.
    curvature: the estimate of the Hessian's diagonal that it follows, see `curvature.py`.
    by_rows: a row's update needs no other row's gradient; the method is then `ByRows`. survey: the
    same once it has been shown all rows; it is then `Surveying`.
    """

    full_gradient: bool
    decay_first: bool
    curvature: Curvature = "none"
    by_rows: bool = False
    survey: bool = False


class Method(Protocol):
    @property
    def needs(self) -> Needs: ...

    def init(self, weight: Tensor, place: Place) -> State:
        """Allocate every state tensor on weight.device; on "meta" this is how bytes are counted."""

    def refresh(self, grad: Tensor, state: State) -> None:
        """Choose the subspace anew if it is due."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        """What must be kept of a gradient: itself, or its projection. Linear."""

    def update(self, kept: Tensor, state: State) -> Step | None:
        """The step, before learning rate and decay; advances the counters. kept is consumed.

        None leaves the weight as it is, without decay.
        """


RowUpdate = Callable[[Tensor, int], Step]
"""update(gradient rows, number of the first): the step of these rows, which counts them from 0."""


@runtime_checkable
class ByRows(Protocol):
    """What else a method has that can update rows while the gradient of others is not yet there."""

    @property
    def needs(self) -> Needs: ...

    def row_update(self, shown: Tensor, state: State) -> RowUpdate | None:
        """Begin an update and advance the counters; what it returns is called for all rows in turn.

        shown: some rows of the gradient. Rows start at multiples of 256 elements. None leaves the
        weight as it is, without decay.
        """


@runtime_checkable
class Surveying(Protocol):
    """What else a method has that can update rows after a look at all of them."""

    @property
    def needs(self) -> Needs: ...

    def survey(self, rows: Tensor, so_far: Tensor | None) -> Tensor:
        """What is known of the gradient with these rows; so_far: of those before them."""

    def surveyed_update(self, survey: Tensor, shape: torch.Size, state: State) -> RowUpdate | None:
        """As `ByRows.row_update`. shape: of the whole gradient."""


@runtime_checkable
class Reallocating(Protocol):
    """What else a method has whose tensors change their shapes during training."""

    def release(self, state: State) -> None:
        """An update begins: free what it will not need, before other weights allocate."""

    def reallocate(self, weight: Tensor, state: State, numbers: Mapping[str, int | float]) -> None:
        """Hold the tensors that a saved state with these numbers holds; values follow."""


@dataclass(frozen=True)
class ByRole:
    """What a method builds: its own treatment of matrices, and that of everything else.

    matrix: attention and MLP. other: norms, biases, and embedding and head unless they are given.
    """

    matrix: Method
    other: Method
    embedding: Method | None = None
    head: Method | None = None

    def of(self, role: str) -> Method:
        """The method of a parameter with that role."""
        if role.startswith(("attention", "mlp")):
            return self.matrix
        given = {"embedding": self.embedding, "head": self.head}.get(role)
        return given if given is not None else self.other


@dataclass(frozen=True)
class Dense:
    """A rule applied to the whole gradient.

    multiplier: of the step, not of the decay.
    """

    rule: Rule
    decay_first: bool = True
    multiplier: float = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(
            full_gradient=True,
            decay_first=self.decay_first,
            by_rows=getattr(self.rule, "by_rows", False),
            survey=isinstance(self.rule, SurveyingRule) and self.rule.surveys,
        )

    def init(self, weight: Tensor, place: Place) -> State:
        state: State = {"step": 0, "seed": place.seed}
        self.rule.init(state, weight, place)
        return state

    def refresh(self, grad: Tensor, state: State) -> None:
        """No subspace."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Step | None:
        update = self.row_update(kept, state)
        return None if update is None else update(kept, 0)

    def row_update(self, shown: Tensor, state: State) -> RowUpdate | None:
        state["step"] = number(state, "step") + 1
        return self._rows_of(self.rule.direction(shown, state), shown.shape)

    def survey(self, rows: Tensor, so_far: Tensor | None) -> Tensor:
        assert isinstance(self.rule, SurveyingRule)
        return self.rule.survey(rows, so_far)

    def surveyed_update(self, survey: Tensor, shape: torch.Size, state: State) -> RowUpdate | None:
        assert isinstance(self.rule, SurveyingRule)
        state["step"] = number(state, "step") + 1
        return self._rows_of(self.rule.surveyed(survey, shape[0]), shape)

    def _rows_of(self, direction: Direction | None, shape: torch.Size) -> RowUpdate | None:
        if direction is None:
            return None
        width = shape.numel() // max(1, shape[0])

        def update(gradient: Tensor, first: int) -> Step:
            flat, offset = gradient.view(-1), first * width

            def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
                piece = flat[start * width : stop * width].float()
                at = slice(offset + start * width, offset + stop * width)
                direction.add_to(rows.view(-1), piece, at, alpha * self.multiplier)

            one_pass = direction.one_pass and gradient.dtype == torch.float32
            return OnePassStep(step) if one_pass else step

        return update


@dataclass(frozen=True)
class Projected:
    """A rule inside a subspace of the gradient.

    on_refresh: moments are kept as they are, rotated into the new basis, or forgotten together
    with the count of updates that bias correction uses.
    """

    projector: Projector
    rule: SubspaceRule
    lift: Lift
    refresh_when: Refresh
    on_refresh: OnRefresh = "keep"
    decay_first: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(self.lift.needs_gradient, self.decay_first)

    def init(self, weight: Tensor, place: Place) -> State:
        state: State = {"step": 0, "seed": place.seed}
        self.projector.init(state, weight, place)
        if self.on_refresh == "reset":
            state["since"] = 0
        self.rule.init(state, self.projector.down(weight, state), place)
        self.lift.init(state, weight)
        self.refresh_when.init(state, place)
        return state

    def refresh(self, grad: Tensor, state: State) -> None:
        if not self.refresh_when.due(state):
            return
        if self.on_refresh == "rotate":
            old = self.projector.basis(state).clone()
        self.projector.refresh(grad, state)
        if self.on_refresh == "reset":
            self.rule.reset(state)
            state["since"] = number(state, "step")
        if self.on_refresh == "rotate" and number(state, "step"):
            new = self.projector.basis(state)
            self.rule.rotate(state, new.T @ old, bool(state["right"]))
        self.refresh_when.refreshed(state)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad if self.lift.needs_gradient else self.projector.down(grad, state)

    def update(self, kept: Tensor, state: State) -> Step | None:
        state["step"] = number(state, "step") + 1
        if isinstance(self.projector, Norming) and isinstance(self.lift, Normed):
            found = self.projector.down_with_norms(kept, state)
            if found is not None:
                low, norms = found
                direction, factor = whole(self.rule, low, state)
                return self.lift.with_norms(kept, low, norms, direction, factor, state)
        low = self.projector.down(kept, state) if self.lift.needs_gradient else kept
        direction, factor = whole(self.rule, low, state)
        return self.lift(kept, low, direction, factor, self.projector, state)
