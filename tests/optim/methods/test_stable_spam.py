"""Stable-SPAM's clean order against its formulas in float64; the released one has an oracle."""

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

OPTIONS = {"gammas": (0.7, 0.9, 0.99), "period": 8, "total": 30, "eps": 1e-3}


def transcribed(start: Tensor, grads: list[Tensor]) -> Tensor:
    weight = start.double()
    m = v = torch.zeros_like(weight)
    x = a = square = 0.0
    k = 0
    for update, grad in enumerate(grads, start=1):
        share = 0.5 + 0.5 * (1 + math.cos(math.pi * update / 31)) / 2
        g, g1 = grad.double(), 0.7 * share
        weight = weight * (1 - LR * DECAY)
        x = 0.99 * x + 0.01 * g.abs().max().item()
        limit = x / (1 - 0.99**update)
        g = torch.where(g.abs() > limit, g / g.abs().max() * limit, g)
        norm = g.norm().item()
        a = g1 * a + (1 - g1) * norm
        square = 0.9 * square + 0.1 * norm**2
        if norm > 0:
            usual = a / (1 - g1**update) / (math.sqrt(square / (1 - 0.9**update)) + 1e-3)
            g = g / norm * usual
        k += 1
        if update % 8 == 0:
            m, v, k = torch.zeros_like(m), torch.zeros_like(v), 1
        b1 = 0.9 * share
        m, v = b1 * m + (1 - b1) * g, 0.999 * v + 0.001 * g**2
        root = v.sqrt() / math.sqrt(1 - 0.999**k) + 1e-3
        weight = weight - LR / (1 - b1**k) * m / root
    return weight


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_clean_order_follows_its_formulas(shape: tuple[int, ...]) -> None:
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 20)
    grads[6] *= 50.0
    grads[10] *= 0.0
    found = run(build_method("stable_spam", OPTIONS).matrix, start, grads)
    expected = transcribed(start, grads)
    torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=0)  # 20 float32 updates


def last_step(released: bool, update: int) -> float:
    """The size of that update, of gradients that are always 1."""
    weight = torch.zeros(4, 4)
    options = {"period": 10, "released_order": released}
    optimizer = optimizer_of(build_method("stable_spam", options).matrix, weight, decay=0.0)
    for _ in range(update):
        before = weight.clone()
        step(optimizer, torch.ones(4, 4), lr=1.0)
    return (before - weight).mean().item()


def test_a_reset_leaves_the_step_at_its_usual_size_unlike_the_released_order() -> None:
    """Old moments with the correction of update 1, then empty ones with that of update 2."""
    usual = last_step(False, 9)
    assert [last_step(False, u) for u in (10, 11)] == pytest.approx([usual, usual], rel=1e-3)
    # M = 0.65 against 0.1 of a first update, sqrt(V) likewise.
    assert last_step(True, 10) == pytest.approx(usual * 2.06, rel=0.05)
    assert last_step(True, 11) != pytest.approx(usual, rel=0.1)


def test_clipping_survives_a_reset_unlike_in_the_released_order() -> None:
    """There the statistics are not reset but corrected as if new: the limit is far too high."""

    def prominence(released: bool) -> float:
        """The spike's size in what reaches Adam, against the norm of the rest."""
        options = {"period": 100, "released_order": released, "gammas": (0.7, 0.9, 0.99)}
        optimizer = optimizer_of(build_method("stable_spam", options).matrix, torch.zeros(6, 6))
        for grad in gradients((6, 6), 101):
            step(optimizer, grad)
        v = tensor(optimizer.slots["weight"].state, "exp_avg_sq")
        before = v.clone()
        spike = gradients((6, 6), 1, seed=5)[0]
        spike[0, 0] = 1000.0
        step(optimizer, spike)
        squares = v - 0.999 * before
        return (squares[0, 0] / (squares.sum() - squares[0, 0])).sqrt().item()

    assert prominence(False) < 5
    assert prominence(True) > 50
