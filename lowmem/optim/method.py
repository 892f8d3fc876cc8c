"""How one weight is updated: the Method protocol and its two standard forms.

    Dense(Adam())                                               AdamW
    Projected(SVD(128), Adam(), ProjectBack(0.25), Every(200))  GaLore

A method is frozen; all that varies lives in `state`, a flat dict of tensors and numbers. Four
calls, because `refresh` is rare and expensive, `compress` is per micro-batch, `update` per step,
and because `compress` is linear: sums, means and clipping act on what it returns.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowmem.optim.formats import State, number
from lowmem.optim.lifts import Lift
from lowmem.optim.projectors import Projector, Rows
from lowmem.optim.refresh import Refresh
from lowmem.optim.rules import Rule


@dataclass(frozen=True)
class Needs:
    """What a method asks of the optimizer.

    full_gradient: it cannot accumulate in a subspace. decay_first: weight decay before the step.
    """

    full_gradient: bool
    decay_first: bool


class Method(Protocol):
    @property
    def needs(self) -> Needs: ...

    def init(self, weight: Tensor, seed: int) -> State:
        """Allocate every state tensor on weight.device; on "meta" this is how bytes are counted."""

    def refresh(self, grad: Tensor, state: State) -> None:
        """Choose the subspace anew if it is due."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        """What must be kept of a gradient: itself, or its projection. Linear."""

    def update(self, kept: Tensor, state: State) -> Rows:
        """The direction in rows, before learning rate and decay; advances the counters.

        kept is consumed.
        """


@dataclass(frozen=True)
class Dense:
    """A rule applied to the whole gradient: embeddings, norms and the baselines."""

    rule: Rule
    decay_first: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=True, decay_first=self.decay_first)

    def init(self, weight: Tensor, seed: int) -> State:
        state: State = {"step": 0, "seed": seed}
        self.rule.init(state, weight)
        return state

    def refresh(self, grad: Tensor, state: State) -> None:
        """No subspace."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Rows:
        state["step"] = number(state, "step") + 1
        direction, factor = self.rule.direction(kept, state)
        if factor != 1.0:
            direction.mul_(factor)
        return lambda start, stop: direction[start:stop]


@dataclass(frozen=True)
class Projected:
    """A rule inside a subspace of the gradient.

    rest: how the parameters that are not projected (embedding, head, norms) are updated.
    """

    projector: Projector
    rule: Rule
    lift: Lift
    refresh_when: Refresh
    rest: Dense
    decay_first: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(self.lift.needs_gradient, self.decay_first)

    def init(self, weight: Tensor, seed: int) -> State:
        state: State = {"step": 0, "seed": seed}
        self.projector.init(state, weight)
        self.rule.init(state, self.projector.down(weight, state))
        self.lift.init(state, weight)
        return state

    def refresh(self, grad: Tensor, state: State) -> None:
        if self.refresh_when.due(number(state, "step")):
            self.projector.refresh(grad, state)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad if self.lift.needs_gradient else self.projector.down(grad, state)

    def update(self, kept: Tensor, state: State) -> Rows:
        state["step"] = number(state, "step") + 1
        low = self.projector.down(kept, state) if self.lift.needs_gradient else kept
        # Rules work in place; a lift that looks at the gradient still wants the projection.
        source = low.clone() if self.lift.needs_gradient else low
        direction, factor = self.rule.direction(source, state)
        return self.lift(kept, low, direction, factor, self.projector, state)
