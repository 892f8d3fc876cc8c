"""Fira and APOLLO as their papers write them, line by line in float64, with nothing merged."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowmem.optim.formats import tensor
from lowmem.optim.method import Method, Projected
from tests.optim.methods.trajectory import DECAY, LR, optimizer_of, step


@dataclass
class Slow:
    """One matrix. Every call is an update; P: (s, r), our basis or whatever is to be tried."""

    weight: Tensor
    right: bool
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias: str = "step"
    gamma: float = 1.01
    count: int = 0
    last: float | None = None
    moments: list[Any] = field(default_factory=lambda: [0.0, 0.0])

    def adam(self, low: Tensor) -> tuple[Tensor, float]:
        """(N, factor of the whole step)."""
        self.count += 1
        b1, b2 = self.betas
        self.moments[0] = b1 * self.moments[0] + (1 - b1) * low
        self.moments[1] = b2 * self.moments[1] + (1 - b2) * low * low
        first, second = self.moments
        c1, c2 = 1 - b1**self.count, 1 - b2**self.count
        if self.bias == "inside":
            return first / c1 / ((second / c2).sqrt() + self.eps), 1.0
        return first / (second.sqrt() + self.eps), math.sqrt(c2) / c1

    def down(self, grad: Tensor, P: Tensor) -> Tensor:
        return grad @ P if self.right else P.T @ grad

    def up(self, low: Tensor, P: Tensor) -> Tensor:
        return low @ P.T if self.right else P @ low

    def factors(self, direction: Tensor, low: Tensor) -> Tensor:
        axis = 1 if self.right else 0
        return direction.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)

    def limit(self, step: Tensor) -> Tensor:
        norm = step.norm().item()
        if self.last is not None:
            excess = max(norm / (self.last + 1e-8), self.gamma) / self.gamma
            step, norm = step / excess, norm / excess
        if norm > 0:
            self.last = norm
        return step

    def move(self, direction: Tensor, factor: float) -> None:
        self.weight = self.weight - LR * factor * direction
        self.weight = self.weight * (1 - LR * DECAY)

    def fira(self, grad: Tensor, P: Tensor, alpha: float, form: str) -> None:
        low = self.down(grad, P)
        direction, factor = self.adam(low)
        phi = self.factors(direction, low)
        if form == "released":
            rest = self.limit(phi * (grad - alpha * self.up(low, P)))
            self.move(alpha * self.up(direction, P) + rest, factor)
        else:
            rest = self.limit(phi * (grad - self.up(low, P)))
            self.move(alpha * (self.up(direction, P) + rest), factor)

    def apollo(self, grad: Tensor, P: Tensor, alpha: float, per: str) -> None:
        low = self.down(grad, P)
        direction, factor = self.adam(low)
        whole = direction.norm() / (low.norm() + 1e-8)
        phi = self.factors(direction, low) if per == "channel" else whole
        self.move(alpha * self.limit(phi * grad), factor)


def beside(method: Method, start: Tensor, grads: list[Tensor], kind: str, **how: Any) -> Slow:
    """Both run together: the slow one is given our basis. Asserts that they agree throughout.

    kind: fira or apollo; how: fields of `Slow`, and alpha with form or per.
    """
    assert isinstance(method, Projected)
    own = {key: how.pop(key) for key in ("alpha", "form", "per") if key in how}
    weight = start.clone()
    optimizer = optimizer_of(method, weight)
    state = optimizer.slots["weight"].state
    slow = Slow(start.double(), bool(state["right"]), **how)
    for grad in grads:
        step(optimizer, grad)
        getattr(slow, kind)(grad.double(), method.projector.basis(state).double(), **own)
        # Float32 against float64: rounding of the weight, and 1e-6 of a step of about lr.
        assert (weight.double() - slow.weight).abs().max() < 2e-6
        if slow.last is not None:
            assert abs(tensor(state, "limiter_norm").item() / slow.last - 1) < 2e-5
    return slow
