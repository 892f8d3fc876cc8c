"""AdamP: its projection in float64, and the choice between rows, matrix and nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels import slices
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.methods.trajectory import DECAY, LR, SHAPES, gradients, optimizer_of, run, step

OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-3}


def transcribed(start: Tensor, grads: list[Tensor], delta: float) -> tuple[Tensor, list[str]]:
    weight = start.double()
    m = v = torch.zeros_like(weight)
    chosen = []
    for k, grad in enumerate(grads, start=1):
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        u = m / (1 - 0.9**k) / ((v / (1 - 0.99**k)).sqrt() + 1e-3)
        rows = torch.cosine_similarity(weight, g, dim=1).abs().max()
        whole = torch.cosine_similarity(weight.view(-1), g.view(-1), dim=0).abs()
        if rows < delta / g.shape[1] ** 0.5:
            chosen.append("rows")
            unit = weight / (weight.norm(dim=1, keepdim=True) + 1e-3)
            u = u - unit * (unit * u).sum(dim=1, keepdim=True)
        elif whole < delta / g.numel() ** 0.5:
            chosen.append("matrix")
            unit = weight / (weight.norm() + 1e-3)
            u = u - unit * (unit * u).sum()
        else:
            chosen.append("nothing")
        weight = weight * (1 - LR * DECAY) - LR * u
    return weight, chosen


@pytest.mark.parametrize("delta", [0.0, 0.7, 2.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_follows_its_formula(shape: tuple[int, ...], delta: float) -> None:
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 12)
    found = run(build_method("adamp", OPTIONS | {"delta": delta}).matrix, start, grads)
    expected, _ = transcribed(start, grads, delta)
    # 12 updates in float32; decay changes |w| by 1e-3 beside eps = 1e-3.
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)


def test_the_formula_is_tested_where_each_choice_occurs() -> None:
    chosen: set[str] = set()
    for shape in SHAPES.values():
        start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 12)
        for delta in (0.7, 2.0, 10.0):
            chosen |= set(transcribed(start, grads, delta)[1])
    assert chosen == {"rows", "matrix", "nothing"}


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("delta", [1.0, 20.0])
def test_slicing_changes_little(delta: float, states: str, monkeypatch: Any) -> None:
    """The choice is of the whole matrix, also where it is written in many groups of rows."""
    start, grads = gradients((512, 40), 1, seed=1)[0], gradients((512, 40), 4)
    method = build_method("adamp", {"delta": delta, "states": states}).matrix
    expected = run(method, start, grads)
    monkeypatch.setitem(slices.SLICE_ELEMENTS, "cpu", 2048)
    torch.testing.assert_close(run(method, start, grads), expected, atol=1e-6, rtol=0)


def test_a_projected_step_is_orthogonal_to_every_row() -> None:
    weight = gradients((6, 9), 1, seed=1)[0]
    before = weight.clone()
    optimizer = optimizer_of(build_method("adamp", {"delta": 50.0}).matrix, weight, decay=0.0)
    step(optimizer, gradients((6, 9), 1)[0])
    torch.testing.assert_close(
        (before * (before - weight)).sum(dim=1), torch.zeros(6), atol=1e-6, rtol=0
    )
    assert tensor(optimizer.slots["weight"].state, "log.projected") == 1


def test_it_sees_an_8_bit_weight_as_well() -> None:
    exact = gradients((16, 32), 1, seed=1)[0]
    weight = GroupedWeight.of(exact, group=32)
    before = weight.values()
    optimizer = Optimizer("unfused", seed=0)
    optimizer.add("weight", weight, build_method("adamp", {"delta": 50.0}).matrix, 0.0)
    step(optimizer, gradients((16, 32), 1)[0], lr=0.5)
    moved = weight.values() - before
    cosines = torch.cosine_similarity(moved, before, dim=1)
    assert cosines.abs().max() < 0.05  # codes are rounded


def test_every_matrix_is_projected_and_no_vector() -> None:
    method = build_method("adamp", {})
    assert method.of("embedding") == method.of("head") == method.of("mlp.up")
    assert method.of("norm") != method.of("mlp.up")
