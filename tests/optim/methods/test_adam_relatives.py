"""AdaBelief, EXAdam and diffGrad against their formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.methods.trajectory import DECAY, LR, SHAPES, gradients, run

B1, B2, EPS = 0.9, 0.99, 1e-3  # a large eps, so that its place shows

Updates = Callable[[int, Tensor, dict[str, Tensor]], Tensor]


def adabelief(k: int, g: Tensor, past: dict[str, Tensor]) -> Tensor:
    m = past["m"] = B1 * past["m"] + (1 - B1) * g
    s = past["s"] = B2 * past["s"] + (1 - B2) * (g - m) ** 2 + EPS
    return m / (1 - B1**k) / ((s / (1 - B2**k)).sqrt() + EPS)


def exadam(k: int, g: Tensor, past: dict[str, Tensor]) -> Tensor:
    m = past["m"] = B1 * past["m"] + (1 - B1) * g
    s = past["s"] = B2 * past["s"] + (1 - B2) * g**2
    d1 = 1 + s / (s + EPS) * B2**k
    d2 = 1 + m**2 / (m**2 + EPS) * B1**k
    moment, now = d1 * m / (1 - B1**k), d1 * g / (1 - B1**k)
    return (moment + now) / ((d2 * s / (1 - B2**k)).sqrt() + EPS)


def diffgrad(k: int, g: Tensor, past: dict[str, Tensor]) -> Tensor:
    friction = 1 / (1 + torch.exp(-(past["previous"] - g).abs()))
    past["previous"] = g
    m = past["m"] = B1 * past["m"] + (1 - B1) * g
    s = past["s"] = B2 * past["s"] + (1 - B2) * g**2
    return friction * m / (1 - B1**k) / ((s / (1 - B2**k)).sqrt() + EPS)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("formula", [adabelief, exadam, diffgrad])
def test_it_follows_its_formula(formula: Any, shape: tuple[int, ...]) -> None:
    grads = gradients(shape, 12)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options = {"betas": (B1, B2), "eps": EPS}
    found = run(build_method(formula.__name__, options).matrix, start, grads)
    weight = start.double()
    past = dict.fromkeys(("m", "s", "previous"), torch.zeros(shape, dtype=torch.float64))
    for k, grad in enumerate(grads, start=1):
        weight = weight * (1 - LR * DECAY) - LR * formula(k, grad.double(), past)
    torch.testing.assert_close(found.double(), weight, atol=2e-6, rtol=0)  # 12 updates in float32


def test_diffgrad_compares_with_the_gradient_before_not_with_a_moment() -> None:
    """The friction of a gradient that stays the same is a half, from its second update on."""
    weight = torch.zeros(4, 4)
    optimizer = Optimizer("fused", seed=0)
    optimizer.add("weight", weight, build_method("diffgrad", {}).matrix, 0.0)
    for update in range(3):
        before = weight.clone()
        optimizer.begin(1.0, 1)
        optimizer.receive("weight", torch.full((4, 4), 2.0))
        share = torch.sigmoid(torch.tensor(2.0 if update == 0 else 0.0))
        torch.testing.assert_close(before - weight, share.expand(4, 4), atol=1e-5, rtol=0)
    assert torch.equal(tensor(optimizer.slots["weight"].state, "previous"), torch.full((4, 4), 2.0))
