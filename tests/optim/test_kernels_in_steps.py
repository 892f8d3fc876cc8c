"""Whole updates with Triton's kernels against the same updates in plain PyTorch."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels.dispatch import forced
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.kernels.calls import Calls

SHAPE = (24, 300)  # rows begin inside of blocks
CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def weight_of(form: str, device: str) -> Any:
    values = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight = values.to(torch.float32 if form == "fp32" else torch.bfloat16).to(device)
    return GroupedWeight.of(weight, 128) if form == "int8" else weight


def updated(form: str, method: str, options: dict[str, Any], choice: str) -> dict[str, Tensor]:
    """Weight and states after three updates."""
    with forced(choice), Calls() as calls:
        optimizer = Optimizer("unfused", seed=3)
        weight = weight_of(form, DEVICE)
        optimizer.add("w", weight, build_method(method, options).matrix, 0.1)
        for update in range(3):
            optimizer.begin(0.01, 1)
            drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + update))
            optimizer.receive("w", 1e-3 * drawn.to(DEVICE))
            optimizer.step()
    assert bool(calls.kernels) == (choice == "triton")
    stored = weight.values() if isinstance(weight, GroupedWeight) else weight.float()
    return {"w": stored} | dict(optimizer.state_tensors())


CASES = [
    ("fp32", "adam8bit", {}),
    ("bf16", "adam8bit", {}),
    ("bf16", "adamw", {}),
    ("int8", "adam8bit", {}),
    ("int8", "q_apollo", {"rank": 8}),
    ("bf16", "galore", {"rank": 8, "states": "8bit", "min_8bit": 0}),
    ("bf16", "apollo_mini", {}),
]


@needs_triton
@pytest.mark.parametrize(("form", "method", "options"), CASES, ids=lambda each: str(each))
def test_kernels_make_the_step_of_the_reference(
    form: str, method: str, options: dict[str, Any]
) -> None:
    found = updated(form, method, options, "triton")
    wanted = updated(form, method, options, "reference")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if value.is_floating_point():
            # Three steps of 0.01; the last bit of a step may turn one stochastic rounding around.
            off = (found[key] - value).abs() > 1e-6 + 1e-5 * value.abs()
            assert off.float().mean() < 0.002, key
        else:
            assert found[key].ne(value).float().mean() < 0.002, key
