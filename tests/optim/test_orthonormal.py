"""Float32 bases whose remainder is used: orthonormal, random, exact for bf16 gradients too."""

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor
from lowmem.optim.orthonormal import (
    LeadingPairs,
    LeadingVectors,
    RandomPairs,
    RandomVectors,
    draw_vectors,
    project_exactly,
)
from lowmem.optim.place import Place
from lowmem.optim.projectors import Projector
from tests.optim.steps import full

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1), (300, 70)]
PROJECTORS: list[Projector] = [
    LeadingVectors(0.5, solver="eigh"),
    LeadingVectors(0.5, "reverse_std", "eigh"),
    RandomVectors(0.5),
    RandomVectors(0.9, "reverse_std"),
    LeadingPairs(0.5, "eigh"),
    RandomPairs(0.5),
    LeadingVectors(0.0),
    LeadingPairs(0.0),
    RandomVectors(0.0),
]


def bases(state: State) -> list[Tensor]:
    return [tensor(state, key) for key in state if key.endswith("basis")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_up_after_down_is_an_orthogonal_projection(
    projector: Projector, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """And exact to float32 where weights and gradients are bf16."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    for basis in bases(state):
        assert basis.dtype == torch.float32
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=2e-6, rtol=0)
    once = full(projector.up(projector.down(grad, state), state), shape)
    twice = full(projector.up(projector.down(once, state), state), shape)
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=0)
    rest = grad.float() - once
    assert (rest * once).sum().abs() < 1e-3 * grad.float().square().sum().clamp(min=1e-3)


@pytest.mark.parametrize("right", [False, True])
def test_a_bf16_gradient_is_projected_in_float32(right: bool) -> None:
    grad = torch.randn(700, 300).bfloat16()
    basis = torch.randn(300 if right else 700, 8)
    exact = grad.double() @ basis.double() if right else basis.double().T @ grad.double()
    found = project_exactly(grad, basis, right)
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-5)


def test_random_vectors_are_uniformly_distributed() -> None:
    """The QR of most libraries gives a first row of one sign; the mean would show it."""
    basis, entries = torch.zeros(12, 3), []
    for seed in range(400):
        draw_vectors(basis, seed)
        entries.append(basis.clone())
    together = torch.stack(entries)
    assert together.mean(dim=0).abs().max() < 4.5 * (12 * 400) ** -0.5
    torch.testing.assert_close(
        together.square().mean(dim=0), torch.full((12, 3), 1 / 12), atol=0.025, rtol=0
    )


def test_random_vectors_do_not_look_at_the_gradient() -> None:
    found = []
    for fill in (1.0, float("nan")):
        state: State = {"step": 0, "seed": 4}
        projector = RandomVectors(0.5)
        projector.init(state, torch.zeros(10, 6), Place())
        projector.refresh(torch.full((10, 6), fill), state)
        found.append(tensor(state, "basis"))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_inside_leading_vectors_leaves_float32_rounding(dtype: torch.dtype) -> None:
    """Three distinct rows, exact in bf16, repeated: rank 3 of 20."""
    rows = torch.randn(3, 20, generator=torch.Generator().manual_seed(5)).to(dtype)
    grad = rows.repeat(10, 1)
    state: State = {"step": 0, "seed": 1}
    projector = LeadingVectors(0.25, solver="eigh")
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    rest = grad.float() - full(projector.up(projector.down(grad, state), state), (30, 20))
    assert rest.abs().max() <= 4 * torch.finfo(torch.float32).eps * grad.float().abs().max()
