"""SPAM against its rules in float64, and its traps."""

import math

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from tests.optim.methods.trajectory import (
    DECAY,
    LR,
    SHAPES,
    gradients,
    optimizer_of,
    run,
    step,
)

OPTIONS = {"threshold": 4.0, "period": 10, "settle": 3, "warmup": 4, "eps": 1e-3}


def transcribed(start: Tensor, grads: list[Tensor]) -> Tensor:
    weight = start.double()
    m = v = torch.zeros_like(weight)
    since = None
    for k, grad in enumerate(grads, start=1):
        g = grad.double()
        if k % 10 == 0:
            m = v = torch.zeros_like(weight)
            since = 0
        if k >= 3 and k % 10 >= 3:
            g = torch.where(g**2 > 4 * v, g.sign() * (4 * v).sqrt(), g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        share = 1.0
        if since is not None and since < 4:
            share = 1 - 0.99 * (1 + math.cos(math.pi * since / 5)) / 2
        since = None if since is None else since + 1
        factor = share * math.sqrt(1 - 0.999**k) / (1 - 0.9**k)
        weight = (weight - LR * factor * m / (v.sqrt() + 1e-3)) * (1 - LR * DECAY)
    return weight


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_follows_its_rules_through_two_resets(shape: tuple[int, ...]) -> None:
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 27)
    found = run(build_method("spam", OPTIONS).matrix, start, grads)
    expected = transcribed(start, grads)
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=0)  # 27 float32 updates


def test_nothing_is_clipped_until_the_moments_have_settled() -> None:
    """V = 0 would clip every element to 0: at the start and after every reset."""
    optimizer = optimizer_of(build_method("spam", OPTIONS).matrix, torch.zeros(6, 6))
    for update, grad in enumerate(gradients((6, 6), 13), start=1):
        step(optimizer, grad)
        if update in (1, 10):
            v = tensor(optimizer.slots["weight"].state, "exp_avg_sq")
            torch.testing.assert_close(v, 0.001 * grad**2, atol=1e-9, rtol=1e-5)


def test_an_element_without_history_is_not_held_at_zero() -> None:
    """The released code clips the first gradient of a rare token to 0, and so for ever."""
    weight = torch.zeros(4, 5)
    optimizer = optimizer_of(build_method("spam", OPTIONS).matrix, weight)
    for grad in gradients((4, 5), 6):
        grad[2] = 0.0
        step(optimizer, grad)
    assert (weight[2] == 0).all()
    step(optimizer, torch.ones(4, 5))
    assert (weight[2] < 0).all()


def test_a_spike_is_clipped_but_the_gradient_handed_in_is_not_changed() -> None:
    optimizer = optimizer_of(build_method("spam", OPTIONS).matrix, torch.zeros(4, 5))
    for grad in gradients((4, 5), 5):
        step(optimizer, grad)
    state = optimizer.slots["weight"].state
    before = tensor(state, "exp_avg_sq").clone()
    spike = torch.full((4, 5), -1e4)
    optimizer.slots["weight"].method.update(spike, state)
    assert (spike == -1e4).all()
    step(optimizer, spike)
    after = tensor(state, "exp_avg_sq")
    torch.testing.assert_close(after, (0.999 + 0.001 * 4) * before, atol=0, rtol=1e-5)
