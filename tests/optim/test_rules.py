"""Adam against torch's AdamW, and against its formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from lowmem.kernels import slices
from lowmem.optim.formats import State, format_named
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, whole


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_adamw_equals_torch() -> None:
    start = torch.randn(17, 9, generator=torch.Generator().manual_seed(1))
    ours, theirs = start.clone(), start.double().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = Optimizer("fused", seed=0)
    optimizer.add("weight", ours, build_method("adamw", {"betas": (0.9, 0.95)}).matrix, 0.1)
    for grad in gradients((17, 9), 30):
        theirs.grad = grad.double()
        reference.step()
        optimizer.begin(0.01, 1)
        optimizer.receive("weight", grad.clone())
    # 30 updates in float32.
    torch.testing.assert_close(ours.double(), theirs.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", ["inside", "step"])
def test_both_bias_corrections_follow_their_formula(bias: str) -> None:
    rule = Adam((0.9, 0.99), 1e-3, bias)  # type: ignore[arg-type]
    state: State = {"step": 0, "seed": 0}
    low = torch.zeros(5, 7)
    rule.init(state, low, Place())
    m = v = torch.zeros(5, 7, dtype=torch.float64)
    for k, grad in enumerate(gradients((5, 7), 6), start=1):
        state["step"] = k
        direction, factor = whole(rule, grad, state)
        m, v = 0.9 * m + 0.1 * grad.double(), 0.99 * v + 0.01 * grad.double() ** 2
        c1, c2 = 1 - 0.9**k, 1 - 0.99**k
        if bias == "inside":
            expected = (m / c1) / ((v / c2).sqrt() + 1e-3)
        else:
            expected = math.sqrt(c2) / c1 * m / (v.sqrt() + 1e-3)
        torch.testing.assert_close(direction.double() * factor, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_slicing_changes_nothing(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def directions() -> list[Tensor]:
        rule = Adam(format=format_named(states, min_elements=0))
        state: State = {"step": 0, "seed": 3}
        rule.init(state, torch.zeros(40, 50), Place())
        found = []
        for k, grad in enumerate(gradients((40, 50), 3), start=1):
            state["step"] = k
            found.append(whole(rule, grad, state)[0])
        return found

    at_once = directions()
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", {"cpu": 512})
    assert all(torch.equal(a, b) for a, b in zip(at_once, directions(), strict=True))
