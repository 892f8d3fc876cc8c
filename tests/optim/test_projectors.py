"""Subspaces: the right side, orthonormal, leading, aligned."""

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor
from lowmem.optim.projectors import SVD, leading_singular_vectors, projects_right

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
    projector = SVD(3, side)  # type: ignore[arg-type]
    state: State = {}
    projector.init(state, grad)
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
    projector = SVD(2)
    state: State = {}
    projector.init(state, grad)
    projector.refresh(grad, state)
    rows = projector.up(projector.down(grad, state), state)
    back = torch.cat([rows(0, 1), rows(1, shape[0])]) if shape[0] > 1 else rows(0, 1)
    u, s, v = torch.linalg.svd(grad, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]  # the best approximation of that rank
    torch.testing.assert_close(back, best, atol=1e-5, rtol=0)


def test_compressing_is_linear() -> None:
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.randn(12, 7, generator=generator) for _ in range(2))
    projector = SVD(3)
    state: State = {}
    projector.init(state, one)
    projector.refresh(one, state)
    both = projector.down(one, state) + projector.down(two, state)
    torch.testing.assert_close(projector.down(one + two, state), both)


def test_signs_are_aligned_with_the_previous_basis() -> None:
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(20, 8, generator=generator)
    projector = SVD(4)
    state: State = {}
    projector.init(state, grad)
    projector.refresh(grad, state)
    flipped = -tensor(state, "basis").clone()
    state["basis"] = flipped.clone()
    projector.refresh(grad + 0.01 * torch.randn(20, 8, generator=generator), state)
    assert ((tensor(state, "basis") * flipped).sum(dim=0) > 0.9).all()


def test_small_singular_values_keep_their_digits() -> None:
    """The Gram matrix squares the spectrum; float64 keeps what float32 would lose."""
    generator = torch.Generator().manual_seed(5)
    u, _ = torch.linalg.qr(torch.randn(40, 6, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(30, 6, generator=generator).double())
    grad = (u * torch.logspace(0, -5, 6, dtype=torch.float64)) @ v.T
    found, usable = leading_singular_vectors(grad, right=True, rank=6)
    assert bool(usable)
    assert ((found.T @ v).abs().diagonal() > 1 - 1e-6).all()


def test_the_largest_entry_of_a_new_vector_is_positive() -> None:
    grad = torch.randn(16, 9, generator=torch.Generator().manual_seed(6))
    for sign in (1.0, -1.0):
        found, _ = leading_singular_vectors(sign * grad, right=True, rank=5)
        assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_non_finite_gradient_keeps_the_basis() -> None:
    grad: Tensor = torch.randn(10, 6, generator=torch.Generator().manual_seed(7))
    projector = SVD(3)
    state: State = {}
    projector.init(state, grad)
    projector.refresh(grad, state)
    before = tensor(state, "basis").clone()
    grad[2, 3] = float("inf")
    projector.refresh(grad, state)
    assert torch.equal(before, tensor(state, "basis"))
