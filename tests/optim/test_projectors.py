"""Subspaces: the right side, orthonormal, leading, aligned."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, projects_right
from tests.optim.steps import part

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_standard_side_is_the_shorter_one(shape: tuple[int, int]) -> None:
    assert projects_right("std", torch.Size(shape)) == (shape[0] >= shape[1])
    assert projects_right("reverse_std", torch.Size(shape)) == (shape[0] < shape[1])
    assert projects_right("right", torch.Size(shape))
    assert not projects_right("left", torch.Size(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_basis_is_that_of_an_svd(shape: tuple[int, int], side: str) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    projector = SVD(3, side, "eigh")  # type: ignore[arg-type]
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    basis = tensor(state, "basis")
    left, _, right = torch.linalg.svd(grad.double())
    expected = right.T if state["right"] else left
    rank = min(3, *shape)  # more vectors than the gradient has rank are arbitrary
    overlap = (basis[:, :rank].double().T @ expected[:, :rank]).abs()
    torch.testing.assert_close(overlap, torch.eye(rank, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_up_after_down_is_the_orthogonal_projection(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    projector = SVD(2, solver="eigh")
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    step = projector.up(projector.down(grad, state), state)
    back = torch.cat([part(step, shape, 0, 1), part(step, shape, 1, shape[0])])
    u, s, v = torch.linalg.svd(grad, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]  # the best approximation of that rank
    torch.testing.assert_close(back, best, atol=1e-5, rtol=0)


def test_compressing_is_linear() -> None:
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.randn(12, 7, generator=generator) for _ in range(2))
    projector = SVD(3)
    state: State = {"step": 0, "seed": 1}
    projector.init(state, one, Place())
    projector.refresh(one, state)
    both = projector.down(one, state) + projector.down(two, state)
    torch.testing.assert_close(projector.down(one + two, state), both)


@pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])
def test_signs_are_aligned_with_the_previous_basis(solver: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(20, 8, generator=generator)
    projector = SVD(4, solver=solver)
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    flipped = -tensor(state, "basis").clone()
    state["basis"], state["step"] = flipped.clone(), 1
    projector.refresh(grad + 0.01 * torch.randn(20, 8, generator=generator), state)
    assert ((tensor(state, "basis") * flipped).sum(dim=0) > 0.9).all()


@pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])
def test_a_non_finite_gradient_keeps_the_basis_and_says_so(solver: Any) -> None:
    grad: Tensor = torch.randn(10, 6, generator=torch.Generator().manual_seed(7))
    projector = SVD(3, solver=solver)
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    assert tensor(state, "log.kept_bases") == 0
    state["step"] = 1
    before = tensor(state, "basis").clone()
    grad[2, 3] = float("inf")
    projector.refresh(grad, state)
    assert torch.equal(before, tensor(state, "basis"))
    assert tensor(state, "log.kept_bases") == 1


def test_energy_and_overlap_are_noted() -> None:
    """|P'G|^2 / |G|^2 and |P_new' P_old|^2 / r."""
    first, second = (
        torch.randn(30, 12, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9)
    )
    projector = SVD(4, solver="eigh")
    state: State = {"step": 0, "seed": 1}
    projector.init(state, first, Place())
    projector.refresh(first, state)
    old, state["step"] = tensor(state, "basis").double(), 1
    projector.refresh(second, state)
    new = tensor(state, "basis").double()
    values = torch.linalg.svdvals(second.double()).square()
    assert tensor(state, "log.energy").item() == pytest.approx(values[:4].sum() / values.sum())
    assert tensor(state, "log.overlap").item() == pytest.approx((new.T @ old).square().sum() / 4)
