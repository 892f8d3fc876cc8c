"""APOLLO and APOLLO-Mini against their formulas in float64, and their traps."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from lowmem.errors import ConfigError
from lowmem.optim.channels import ChannelScaling
from lowmem.optim.formats import tensor
from lowmem.optim.method import ByRole, Dense, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.random_projectors import RandomNormal
from lowmem.optim.restore import restore_states
from lowmem.optim.rules import Adam
from tests.optim.methods.slow_low_rank import beside
from tests.optim.methods.trajectory import SHAPES, gradients, optimizer_of, run, step

both = pytest.mark.parametrize("name", ["apollo", "apollo_mini"])


def built(name: str = "apollo", **options: Any) -> ByRole:
    own: dict[str, Any] = {"gap": 4, "staggered": False}
    own |= {"rank": 3} if name == "apollo" else {}
    return build_method(name, own | options)


def lift(name: str, **options: Any) -> ChannelScaling:
    matrix = build_method(name, options).matrix
    assert isinstance(matrix, Projected)
    assert isinstance(matrix.lift, ChannelScaling)
    return matrix.lift


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("bias", ["step", "inside"])
@pytest.mark.parametrize("projection", ["random", "svd"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_factor_bias_and_projection(
    per: str, bias: str, projection: str, shape: str
) -> None:
    """Of a square the rows are the channels. "inside", the limiter sees corrected norms."""
    grads = [(1 + 3 * (i % 3)) * g for i, g in enumerate(gradients(SHAPES[shape], 9))]
    grads[6] = torch.zeros_like(grads[6])
    options: dict[str, Any] = {"per": per, "bias": bias, "alpha": 0.5}
    method = built(projection=projection, solver="eigh", **options).matrix
    eps = 1e-8 if bias == "inside" else 1e-6
    beside(method, 0.1 * torch.ones(SHAPES[shape]), grads, "apollo", eps=eps, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_mini_has_rank_one_and_one_factor(shape: str) -> None:
    alpha = 128**0.5
    grads = [0.1 * g for g in gradients(SHAPES[shape], 9)]
    method = built("apollo_mini").matrix
    assert isinstance(method, Projected)
    assert method.projector == RandomNormal(1)
    start = torch.zeros(SHAPES[shape])
    beside(method, start, grads, "apollo", alpha=alpha, per="tensor")


def test_options_of_adam_and_of_the_limiter_are_used() -> None:
    how: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "gamma": 1.1}
    method = built(scale=4.0, **how).matrix
    grads = gradients((20, 7), 8)
    beside(method, torch.zeros(20, 7), grads, "apollo", alpha=2.0, per="channel", **how)


@both
def test_alpha_and_scale_name_the_same_thing_and_are_both_shown(name: str) -> None:
    default = {"apollo": 1.0, "apollo_mini": 128.0}[name]
    assert lift(name).scale == default
    assert lift(name).alpha == pytest.approx(math.sqrt(default))
    assert lift(name, alpha=3.0) == lift(name, scale=9.0) == lift(name, alpha=3.0, scale=9.0)
    assert lift(name, alpha=11.3, scale=128.0).alpha == 11.3  # as the paper rounds it
    assert "alpha=3.0" in repr(built(name, scale=9.0))
    assert "scale=9.0" in repr(built(name, scale=9.0))


@both
def test_alpha_and_scale_that_contradict_each_other_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.alpha = 128.0 and optimizer.scale = 128.0"):
        built(name, alpha=128.0, scale=128.0)


@both
def test_scale_front_changes_nothing(name: str) -> None:
    grads = gradients((20, 7), 6)
    weights = [
        run(built(name, scale=9.0, scale_front=front).matrix, torch.zeros(20, 7), grads)
        for front in (False, True)
    ]
    assert torch.equal(*weights)


@both
@pytest.mark.parametrize("after", [0, 3])
def test_a_zero_gradient_does_not_freeze_the_matrix(name: str, after: int) -> None:
    """As released, it would take 1850 updates until steps have a norm of 1 again."""
    weight, grads = torch.zeros(20, 7), gradients((20, 7), 6)
    optimizer = optimizer_of(built(name).matrix, weight, decay=0.0)
    for grad in grads[:after]:
        step(optimizer, grad)
    before = weight.clone()
    step(optimizer, torch.zeros(20, 7))
    assert torch.equal(weight, before)
    for grad in grads[after:]:
        step(optimizer, grad)
        assert (weight - before).norm() > 1e-2
        before = weight.clone()


@both
def test_a_non_finite_gradient_leaves_the_limiter_as_it_was(name: str) -> None:
    optimizer = optimizer_of(built(name).matrix, torch.zeros(20, 7))
    state = optimizer.slots["weight"].state
    step(optimizer, gradients((20, 7), 1)[0])
    before = tensor(state, "limiter_norm").clone()
    step(optimizer, torch.full((20, 7), float("inf")))
    assert torch.equal(tensor(state, "limiter_norm"), before)


@both
def test_equal_shapes_have_projections_of_their_own(name: str) -> None:
    """Seeds come from names: in layer-wise mode the released code starts every one at 1."""
    optimizer = Optimizer("fused", seed=0)
    method = built(name).matrix
    assert isinstance(method, Projected)
    drawn = []
    for index in range(4):
        optimizer.add(f"layers.{index}.q", torch.zeros(20, 7), method, 0.0)
        drawn.append(method.projector.basis(optimizer.slots[f"layers.{index}.q"].state))
    for index, one in enumerate(drawn):
        assert all((one - other).abs().max() > 0.1 for other in drawn[:index])


@both
def test_a_resumed_run_has_the_same_projection(name: str) -> None:
    """Although it is stored nowhere, and whatever the order in which weights are added."""
    method, grads = built(name).matrix, gradients((20, 7), 6)
    assert isinstance(method, Projected)

    def optimizer(*names: str) -> Optimizer:
        made = Optimizer("unfused", seed=3)
        for each in names:
            made.add(each, torch.zeros(20, 7), method, 0.0)
        return made

    def advance(run: Optimizer) -> None:
        for grad in grads:
            run.begin(0.01, 1)
            run.receive("a", grad.clone())
            run.step()

    first, second = optimizer("b", "a"), optimizer("a", "b")
    advance(first)
    restore_states(second, iter(first.state_tensors()), first.state_numbers(), first.updates)
    assert first.slots["a"].state["drawn_basis"] == 2
    one, two = (method.projector.basis(each.slots["a"].state) for each in (first, second))
    assert torch.equal(one, two)


def test_the_projection_changes_every_gap_updates_and_only_then() -> None:
    method = built().matrix
    assert isinstance(method, Projected)
    optimizer = optimizer_of(method, torch.zeros(20, 7))
    state, drawn = optimizer.slots["weight"].state, []
    for grad in gradients((20, 7), 9):
        step(optimizer, grad)
        drawn.append(method.projector.basis(state).clone())
    changed = [not torch.equal(*pair) for pair in pairwise(drawn)]
    assert changed == [False, False, False, True, False, False, False, True]


def test_rank_above_the_shorter_side_is_clipped() -> None:
    optimizer = optimizer_of(built(rank=100).matrix, torch.zeros(20, 7))
    assert tensor(optimizer.slots["weight"].state, "exp_avg").shape == (20, 7)


def test_the_state_of_mini_is_two_vectors_and_the_limiter() -> None:
    optimizer = optimizer_of(built("apollo_mini").matrix, torch.zeros(512, 1376))
    assert sum(value.nbytes for _, value in optimizer.state_tensors()) == 2 * 4 * 1376 + 2 * 4


@both
def test_moments_are_float32_whatever_the_gradient(name: str) -> None:
    """With b2 = 0.999 a second moment in bf16 that is rounded to nearest never decays."""
    optimizer = optimizer_of(built(name).matrix, torch.zeros(20, 7, dtype=torch.bfloat16))
    step(optimizer, torch.ones(20, 7, dtype=torch.bfloat16))
    for key in ("exp_avg", "exp_avg_sq", "limiter_norm"):
        assert tensor(optimizer.slots["weight"].state, key).dtype == torch.float32


def test_everything_else_follows_the_same_adam_decayed_afterwards() -> None:
    assert built().other == Dense(Adam((0.9, 0.999), 1e-6, "step"), decay_first=False)
    inside = built(bias="inside").other
    assert inside == Dense(Adam((0.9, 0.999), 1e-8, "inside"), decay_first=False)
    assert not built().matrix.needs.decay_first
    assert built().matrix.needs.full_gradient


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gamma", 0.9),
        ("per", "row"),
        ("projection", "hadamard"),
        ("scale", 0.0),
        ("alpha", -1.0),
        ("on_refresh", "rotate"),
        ("rank", 0),
    ],
)
@both
def test_unsuitable_options_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer.{option} = "):
        built(name, **{option: value})
