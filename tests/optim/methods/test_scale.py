"""SCALE against its rules in float64, role by role."""

from typing import Any

import pytest
import torch

from lowmem.optim.formats import tensor
from lowmem.optim.methods import METHODS, build_method
from lowmem.optim.rules import Adam
from tests.optim.methods.trajectory import DECAY, LR, SHAPES, gradients, optimizer_of, run, step


@pytest.mark.parametrize("role", ["mlp.up", "embedding", "head"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_role_follows_its_formula(shape: tuple[int, ...], role: str) -> None:
    """What is normalised is an output: a row of (out, in), but a column of (token, hidden)."""
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 10)
    found = run(build_method("scale", {"momentum": 0.8}).of(role), start, grads)
    weight = start.double()
    m = torch.zeros_like(weight)
    for grad in grads:
        g = grad.double()
        m = 0.8 * m + 0.2 * g if role == "head" else g
        rms = m.square().mean(dim=0 if role == "embedding" else 1, keepdim=True).sqrt()
        weight = weight * (1 - LR * DECAY) - LR * m / rms
    torch.testing.assert_close(found.double(), weight, atol=2e-6, rtol=0)  # 10 float32 updates


def test_only_the_head_and_the_norms_have_state() -> None:
    method = build_method("scale", {})
    for role, keys in (
        ("attention.q", set()),
        ("mlp.down", set()),
        ("embedding", set()),
        ("head", {"exp_avg"}),
        ("norm", {"exp_avg", "exp_avg_sq"}),
    ):
        shape = (8,) if role == "norm" else (8, 4)
        optimizer = optimizer_of(method.of(role), torch.zeros(shape))
        assert {key for key, _ in optimizer.state_tensors()} == {f"weight/{key}" for key in keys}


def test_a_row_without_gradient_stays_and_the_others_move() -> None:
    grad = gradients((4, 6), 1)[0]
    grad[1] = 0.0
    weight = torch.ones(4, 6)
    step(optimizer_of(build_method("scale", {}).matrix, weight, decay=0.0), grad)
    assert (weight[1] == 1).all()
    assert (weight[[0, 2, 3]] != 1).all()


def test_a_token_without_gradient_keeps_its_row_of_the_embedding() -> None:
    grad = gradients((6, 4), 1)[0]
    grad[2] = 0.0
    weight = torch.ones(6, 4)
    method: Any = build_method("scale", {}).embedding
    step(optimizer_of(method, weight, decay=0.0), grad)
    assert (weight[2] == 1).all()


def test_norms_follow_adam_at_their_own_rate() -> None:
    """The released scripts give them 1e-3 where matrices have 2e-4 and 1e-4."""
    for parameters, lr in ((int(1.3e9), 2e-4), (int(6.7e9), 1e-4)):
        recipe = METHODS["scale"].recipe(parameters)
        assert recipe["lr"] == lr
        method: Any = build_method("scale", {"adam_multiplier": recipe["adam_multiplier"]}).other
        assert isinstance(method.rule, Adam)
        assert recipe["lr"] * method.multiplier == pytest.approx(1e-3)


def test_8_bit_momentum_of_the_head_takes_a_byte() -> None:
    method: Any = build_method("scale", {"states": "8bit"}).head
    state = optimizer_of(method, torch.zeros(64, 64)).slots["weight"].state
    assert tensor(state, "exp_avg.codes").nbytes == 64 * 64
