"""Fira against its formulas in float64, and its traps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.optim.formats import tensor
from lowmem.optim.method import ByRole, Dense, Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.rules import Adam
from tests.optim.followers.oracle import Steered, read_oracle, recorded_bases
from tests.optim.followers.oracle import run as follow
from tests.optim.methods.slow_low_rank import beside
from tests.optim.methods.trajectory import SHAPES, gradients, optimizer_of, step

ORACLES = Path(__file__).parents[1] / "oracles"


def fira(**options: Any) -> ByRole:
    own = {"rank": 3, "gap": 4, "solver": "eigh", "staggered": False}
    return build_method("fira", own | options)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_both_forms_on_every_side(form: str, alpha: float, side: str, shape: str) -> None:
    """With moments kept over refreshes, gradients of changing size and one that is zero."""
    grads = [(1 + 3 * (i % 3)) * g for i, g in enumerate(gradients(SHAPES[shape], 9))]
    grads[6] = torch.zeros_like(grads[6])
    method = fira(alpha=alpha, form=form, side=side).matrix
    beside(method, 0.1 * torch.ones(SHAPES[shape]), grads, "fira", alpha=alpha, form=form)


@pytest.mark.parametrize("bias", ["step", "inside"])
def test_options_of_adam_and_of_the_limiter_are_used(bias: str) -> None:
    how: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "gamma": 1.1, "bias": bias}
    grads = gradients((20, 7), 8)
    method = fira(alpha=0.5, **how).matrix
    beside(method, torch.zeros(20, 7), grads, "fira", alpha=0.5, form="released", **how)


def test_the_paper_form_with_alpha_is_a_learning_rate_and_follows_the_oracle() -> None:
    """(lr / alpha, alpha) in the paper's form is (lr, 1): the recorded trajectory."""
    oracle, alpha = read_oracle(ORACLES / "fira__alpha1_nowd.safetensors"), 0.25
    about = oracle.about
    faster = {**about, "lr": [lr / alpha for lr in about["lr"]]}
    method = fira(
        rank=about["rank"],
        gap=about["gap"],
        alpha=alpha,
        form="paper",
        betas=tuple(about["betas"]),
        eps=about["eps"],
    ).matrix
    methods: dict[str, Method] = {}
    for name in about["projected"]:
        recorded = {t: oracle.tensors[f"proj.{t}.{name}"] for t in about["refresh_steps"]}
        methods[name] = Steered(method, recorded_bases(recorded))
    _, error = follow(replace(oracle, about=faster), methods)
    assert error < 1e-5


def test_the_two_forms_agree_only_at_alpha_one() -> None:
    grads = gradients((20, 7), 5)

    def weight(**options: Any) -> torch.Tensor:
        moved = torch.zeros(20, 7)
        optimizer = optimizer_of(fira(**options).matrix, moved)
        for grad in grads:
            step(optimizer, grad)
        return moved

    assert torch.equal(weight(alpha=1.0, form="paper"), weight(alpha=1.0, form="released"))
    apart = weight(alpha=0.25, form="paper") - weight(alpha=0.25, form="released")
    assert apart.abs().max() > 1e-2


def test_a_zero_first_gradient_does_not_stop_the_residual() -> None:
    """As released, it would begin at 1e-8 and grow by 1 % per update."""
    weight, grads = torch.zeros(20, 7), gradients((20, 7), 3)
    optimizer = optimizer_of(fira().matrix, weight)
    state = optimizer.slots["weight"].state
    step(optimizer, torch.zeros(20, 7))
    assert not weight.any()
    for grad in grads:
        step(optimizer, grad)
        assert tensor(state, "limiter_norm") > 0.1
    before = tensor(state, "limiter_norm").clone()
    step(optimizer, torch.zeros(20, 7))
    assert torch.equal(tensor(state, "limiter_norm"), before)


def test_a_non_finite_gradient_leaves_the_limiter_as_it_was() -> None:
    optimizer = optimizer_of(fira().matrix, torch.zeros(20, 7))
    state = optimizer.slots["weight"].state
    step(optimizer, gradients((20, 7), 1)[0])
    before = tensor(state, "limiter_norm").clone()
    step(optimizer, torch.full((20, 7), float("nan")))
    assert torch.equal(tensor(state, "limiter_norm"), before)


def test_the_clipped_gradient_is_both_projected_and_kept() -> None:
    """The released code reads the raw gradient again for the residual."""
    grads = gradients((20, 7), 4)
    clipped, expected = torch.zeros(20, 7), torch.zeros(20, 7)
    one, other = optimizer_of(fira().matrix, clipped), optimizer_of(fira().matrix, expected)
    for grad in grads:
        one.begin(0.01, 1)
        one.receive("weight", grad.clone())
        norm = one.norm()
        one.clip(norm, 1.0)
        one.step()
        step(other, grad * (1.0 / (norm + 1e-6)))
    torch.testing.assert_close(clipped, expected, atol=1e-7, rtol=0)
    assert clipped.abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (2, 2)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rank_at_or_above_the_other_side(shape: tuple[int, int], side: str) -> None:
    """A comparison of lengths would take the norms along the wrong axis of R."""
    grads = gradients(shape, 6)
    method = fira(rank=8, alpha=0.5, side=side).matrix
    beside(method, torch.zeros(shape), grads, "fira", alpha=0.5, form="released")


@pytest.mark.parametrize(("states", "names"), [("fp32", 0), ("bf16", 0), ("8bit", 2)])
def test_moments_are_of_the_projection_and_the_limiter_is_one_number(
    states: str, names: int
) -> None:
    optimizer = Optimizer("unfused", seed=0)
    method = fira(states=states, min_8bit=0).matrix
    optimizer.add("weight", torch.zeros(40, 16), method, 0.0)
    sizes = {key.partition("/")[2]: value for key, value in optimizer.state_tensors()}
    assert sizes["basis"].shape == (16, 3)
    assert sizes["limiter_norm"].shape == ()
    moments = [v for k, v in sizes.items() if k in ("exp_avg", "exp_avg.codes")]
    assert [m.shape for m in moments] == [(40, 3)]
    assert sum(key.endswith(".codes") for key in sizes) == names


def test_everything_else_follows_the_same_adam_decayed_afterwards() -> None:
    assert fira().other == Dense(Adam((0.9, 0.999), 1e-6, "step"), decay_first=False)
    assert not fira().matrix.needs.decay_first
    assert fira().matrix.needs.full_gradient
