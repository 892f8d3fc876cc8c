"""Lion: its formula, its two betas, its 8-bit codes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import read_oracle
from tests.optim.followers.oracle import run as run_oracle
from tests.optim.methods.trajectory import DECAY, LR, SHAPES, gradients, optimizer_of, run, step

ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.mark.parametrize("shape", [*SHAPES.values(), (11,)])
def test_it_follows_its_formula(shape: tuple[int, ...]) -> None:
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 9)
    found = run(build_method("lion", {}).matrix, start, grads)
    weight, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for grad in grads:
        weight = weight * (1 - LR * DECAY)
        weight = weight - LR * torch.sign(0.9 * momentum + 0.1 * grad.double())
        momentum = 0.99 * momentum + 0.01 * grad.double()
    torch.testing.assert_close(found.double(), weight, atol=1e-6, rtol=0)  # 9 updates in float32


def test_the_sign_is_that_of_the_interpolation_and_not_of_what_is_stored() -> None:
    """With the betas swapped the second step would go the other way."""
    weight = torch.zeros(1, 1)
    optimizer = optimizer_of(build_method("lion", {"betas": (0.9, 0.99)}).matrix, weight, decay=0.0)
    step(optimizer, torch.full((1, 1), 1.0))
    # 0.9 * 0.01 - 0.1 * 0.05 > 0, but 0.99 * 0.1 - 0.01 * 0.05 and 0.9 * 0.1 differ from it.
    assert tensor(optimizer.slots["weight"].state, "exp_avg").item() == pytest.approx(0.01)
    step(optimizer, torch.full((1, 1), -0.5))
    assert weight.item() == pytest.approx(-LR + LR)  # 0.009 - 0.05 < 0: back again


def test_small_constant_gradients_reach_a_bf16_momentum() -> None:
    """A share of 0.01 is below half a bf16 step: rounded to nearest, M would stand still."""
    method = build_method("lion", {"states": "bf16"}).matrix
    optimizer = optimizer_of(method, torch.zeros(64, 64))
    for _ in range(300):
        step(optimizer, torch.ones(64, 64))
    momentum = tensor(optimizer.slots["weight"].state, "exp_avg").float()
    assert momentum.mean().item() == pytest.approx(1 - 0.99**300, abs=0.01)


def test_codes_and_scales_are_exactly_the_recorded_ones() -> None:
    oracle = read_oracle(ORACLES / "eight_bit_lion__nearest_wd.safetensors")
    about = oracle.about
    options: dict[str, Any] = {"betas": about["betas"], "states": "8bit", "min_8bit": 0}
    compared = []

    def after(done: int, optimizer: Optimizer) -> None:
        for name, slot in optimizer.slots.items():
            key = f"state.{done}.{name}"
            if f"{key}.state1" in oracle.tensors:
                codes, absmax = (tensor(slot.state, f"exp_avg.{k}") for k in ("codes", "absmax"))
                compared.append(torch.equal(codes, oracle.tensors[f"{key}.state1"]))
                compared.append(torch.equal(absmax, oracle.tensors[f"{key}.absmax1"]))

    run_oracle(
        oracle, dict.fromkeys(about["shapes"], build_method("lion", options).matrix), None, after
    )
    assert len(compared) == 18
    assert all(compared)
