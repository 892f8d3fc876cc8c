"""The two standard forms: what they allocate, when they refresh, and what they pass on."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, format_named, tensor
from lowmem.optim.lifts import ProjectBack
from lowmem.optim.method import Dense, Needs, Projected
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, Projector
from lowmem.optim.refresh import Every
from lowmem.optim.rules import Adam, Direction
from lowmem.optim.weights import Step
from tests.optim.steps import full, part

SHAPES = {(24, 10): (24, 4), (10, 24): (4, 24), (12, 12): (12, 4), (3, 2): (3, 2), (1, 16): (1, 16)}


@dataclass(frozen=True)
class Recorded:
    """A lift that looks at the gradient: notes its arguments and gives the gradient back."""

    seen: list[tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=list)
    needs_gradient: bool = True

    def init(self, state: State, weight: Tensor) -> None:
        state["lift"] = 7

    def __call__(
        self,
        kept: Tensor,
        low: Tensor,
        direction: Tensor,
        factor: float,
        projector: Projector,
        state: State,
    ) -> Step:
        self.seen.append((kept.clone(), low.clone(), direction.clone(), factor))

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            rows.add_(kept[start:stop], alpha=alpha)

        return step


def galore(gap: int = 1, lift: ProjectBack | Recorded | None = None) -> Projected:
    rule = Adam(bias="step")
    return Projected(SVD(4, solver="eigh"), rule, lift or ProjectBack(), Every(gap))


def draws(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("shape", "low"), SHAPES.items())
def test_moments_live_in_the_subspace(shape: tuple[int, int], low: tuple[int, int]) -> None:
    state = galore().init(torch.empty(shape, device="meta"), Place(seed=5))
    assert tensor(state, "exp_avg").shape == tensor(state, "exp_avg_sq").shape == low
    assert tensor(state, "exp_avg").is_meta
    assert (state["step"], state["seed"]) == (0, 5)


def test_dense_moments_have_the_weights_shape() -> None:
    state = Dense(Adam(format=format_named("bf16"))).init(torch.empty(5, 7), Place(seed=5))
    assert tensor(state, "exp_avg").shape == (5, 7)
    assert tensor(state, "exp_avg").dtype == torch.bfloat16
    assert (state["step"], state["seed"]) == (0, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_compress_is_linear(shape: tuple[int, int]) -> None:
    """So sums over micro-batches, means over ranks and clipping may act on what is kept."""
    method = galore()
    first, second = draws(shape, 2)
    state = method.init(first, Place())
    method.refresh(first, state)
    together = method.compress(2.0 * first + second, state)
    apart = 2.0 * method.compress(first, state) + method.compress(second, state)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)  # up to 24 terms in float32
    assert together.shape == SHAPES[shape]


def test_the_subspace_is_refreshed_when_it_is_due_and_only_then() -> None:
    method = galore(gap=2)
    state = method.init(torch.empty(24, 10), Place())
    changed = []
    for gradient in draws((24, 10), 5):
        before = tensor(state, "basis").clone()
        method.refresh(gradient, state)
        changed.append(not torch.equal(before, tensor(state, "basis")))
        method.refresh(gradient, state)  # a repeated update changes nothing more
        method.update(method.compress(gradient, state), state)
    assert changed == [True, False, True, False, True]
    assert state["step"] == 5


def test_a_step_stays_inside_the_subspace() -> None:
    method = galore()
    (gradient,) = draws((24, 10), 1)
    state = method.init(gradient, Place())
    method.refresh(gradient, state)
    step = full(method.update(method.compress(gradient, state), state), (24, 10))
    basis = tensor(state, "basis")
    torch.testing.assert_close(step @ basis @ basis.T, step, atol=1e-5, rtol=0)  # float32 products
    assert step.norm() > 1


def test_a_lift_that_needs_the_gradient_gets_it_whole_and_unspoilt() -> None:
    """Rules work in place; gradient and projection must still be there for the lift."""
    lift = Recorded()
    method = galore(lift=lift)
    (gradient,) = draws((24, 10), 1)
    state = method.init(gradient, Place())
    assert state["lift"] == 7
    method.refresh(gradient, state)
    kept = method.compress(gradient, state)
    assert torch.equal(kept, gradient)
    step = method.update(kept, state)
    ((seen, low, direction, factor),) = lift.seen
    assert torch.equal(seen, gradient)
    assert torch.equal(low, gradient @ tensor(state, "basis"))
    # The first update of Adam: M / sqrt(V) is 0.1 / sqrt(0.001) in size, and factor makes it 1.
    expected = (low / (low.abs() + 1e-8 / 0.001**0.5)).double()
    torch.testing.assert_close(direction.double() * factor, expected, atol=1e-5, rtol=0)
    assert torch.equal(part(step, (24, 10), 3, 5), gradient[3:5])


@dataclass(frozen=True)
class Doubling:
    """A rule whose factor is 2."""

    def init(self, state: State, like: Tensor, place: Place) -> None:
        """No state."""

    def direction(self, gradient: Tensor, state: State) -> Direction:
        return Direction(lambda piece, at: piece, 2.0)

    def reset(self, state: State) -> None:
        """No state."""

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        """No state."""


def test_the_factor_of_a_rule_multiplies_a_dense_step() -> None:
    method = Dense(Doubling())
    (gradient,) = draws((6, 3), 1)
    state = method.init(gradient, Place())
    step = method.update(gradient.clone(), state)
    assert torch.equal(full(step, (6, 3)), 2 * gradient)
    assert torch.equal(part(step, (6, 3), 2, 4), 2 * gradient[2:4])
    assert state["step"] == 1


def test_what_methods_ask_for() -> None:
    assert galore().needs == Needs(full_gradient=False, decay_first=False)
    assert galore(lift=Recorded()).needs.full_gradient
    assert Dense(Adam()).needs == Needs(full_gradient=True, decay_first=True, by_rows=True)
    assert not Dense(Adam(), decay_first=False).needs.decay_first


@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate"])
def test_moments_at_a_refresh(on_refresh: Any) -> None:
    """Kept as they are, forgotten with the count of bias correction, or put into the new basis."""
    rule = Adam(bias="inside")
    method = Projected(SVD(3, solver="eigh"), rule, ProjectBack(1.0), Every(2, False), on_refresh)
    grads = draws((12, 7), 3)
    state = method.init(grads[0], Place())
    for gradient in grads[:2]:
        method.refresh(gradient, state)
        method.update(method.compress(gradient, state), state)
    old = {key: tensor(state, key).clone() for key in ("basis", "exp_avg", "exp_avg_sq")}
    method.refresh(grads[2], state)
    transition = tensor(state, "basis").double().T @ old["basis"].double()
    expected = {
        "keep": (old["exp_avg"].double(), old["exp_avg_sq"].double()),
        "reset": (torch.zeros(12, 3).double(),) * 2,
        "rotate": (
            old["exp_avg"].double() @ transition.T,
            old["exp_avg_sq"].double() @ transition.square().T,
        ),
    }[on_refresh]
    for key, value in zip(("exp_avg", "exp_avg_sq"), expected, strict=True):
        # One product of three terms in float32.
        torch.testing.assert_close(tensor(state, key).double(), value, atol=1e-6, rtol=0)
    low = method.compress(grads[2], state).clone()
    step = method.update(low.clone(), state)
    if on_refresh == "reset":  # bias correction starts again: the step is the sign of the gradient
        signs = low.sign() @ tensor(state, "basis").T
        torch.testing.assert_close(full(step, (12, 7)), signs, atol=1e-4, rtol=0)
