"""Bases: three solvers against an SVD in float64, and what iteration is allowed to miss."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.bases import leading_basis

SHAPES = [(40, 24), (24, 40), (32, 32), (1, 16), (16, 1), (5, 3)]
every_solver = pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])


def decaying(m: int, n: int, seed: int) -> Tensor:
    """A matrix with singular values i^-0.6, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
    values = torch.arange(1, min(m, n) + 1).float().pow(-0.6)
    return (u * values) @ v


def energy(grad: Tensor, basis: Tensor, right: bool) -> float:
    """Captured energy relative to the best basis of that rank."""
    low = grad.double() @ basis.double() if right else basis.double().T @ grad.double()
    best = torch.linalg.svdvals(grad.double())[: basis.shape[1]].square().sum()
    return (low.square().sum() / best).item()


@every_solver
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("right", [True, False])
def test_columns_are_orthonormal(solver: Any, shape: tuple[int, int], right: bool) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rank = min(4, shape[1] if right else shape[0])
    basis, usable = leading_basis(grad, right, rank, solver, None, seed=3)
    assert bool(usable)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(basis.double().T @ basis.double(), eye, atol=2e-6, rtol=0)


@every_solver
@pytest.mark.parametrize("right", [True, False])
def test_the_energy_of_the_best_basis_is_captured(solver: Any, right: bool) -> None:
    grad = decaying(200, 96, 2)
    basis, _ = leading_basis(grad, right, 24, solver, None, seed=3)
    assert energy(grad, basis, right) > (0.97 if solver == "iteration" else 1 - 1e-5)


def test_one_warm_iteration_is_nearly_optimal() -> None:
    """From the basis of the same matrix under noise, as after some updates."""
    grad = decaying(256, 640, 4)
    noisy = grad + 0.3 * grad.std() * torch.randn(
        256, 640, generator=torch.Generator().manual_seed(5)
    )
    old, _ = leading_basis(noisy, False, 64, "eigh", None, seed=3)
    new, _ = leading_basis(grad, False, 64, "iteration", old.float(), seed=3)
    assert energy(grad, old, False) < 0.995 < energy(grad, new, False)


def test_iteration_keeps_old_directions_where_the_gradient_has_none() -> None:
    """Early gradients have few directions; a vector that became zero would never come back."""
    grad = torch.zeros(20, 12)
    grad[:3] = torch.randn(3, 12, generator=torch.Generator().manual_seed(6))
    old = torch.eye(12)[:, :8]
    basis, usable = leading_basis(grad, True, 8, "iteration", old, seed=3)
    assert bool(usable)
    # Squared in float64, the damping of 3e-6 leaves 5 digits.
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-4, rtol=0)
    assert energy(grad, basis, True) > 0.99


@every_solver
def test_a_zero_gradient_gives_an_orthonormal_basis(solver: Any) -> None:
    basis, usable = leading_basis(torch.zeros(9, 6), True, 4, solver, None, seed=3)
    assert bool(usable)
    torch.testing.assert_close((basis.T @ basis).float(), torch.eye(4), atol=1e-5, rtol=0)


@every_solver
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_reported(solver: Any, poison: float) -> None:
    grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(7))
    grad[4, 2] = poison
    assert not bool(leading_basis(grad, True, 4, solver, torch.eye(6)[:, :4], seed=3)[1])


def test_a_failed_decomposition_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    basis, usable = leading_basis(torch.randn(9, 6), True, 4, "eigh", None, seed=3)
    assert not bool(usable)
    assert basis.shape == (6, 4)


def test_small_singular_values_keep_their_digits() -> None:
    """The Gram matrix squares the spectrum; float64 keeps what float32 would lose."""
    generator = torch.Generator().manual_seed(5)
    u, _ = torch.linalg.qr(torch.randn(40, 6, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(30, 6, generator=generator).double())
    grad = (u * torch.logspace(0, -5, 6, dtype=torch.float64)) @ v.T
    found, usable = leading_basis(grad, True, 6, "eigh", None, 0)
    assert bool(usable)
    assert ((found.T @ v).abs().diagonal() > 1 - 1e-6).all()


def test_the_largest_entry_of_a_new_vector_is_positive() -> None:
    grad = torch.randn(16, 9, generator=torch.Generator().manual_seed(6))
    for sign in (1.0, -1.0):
        found, _ = leading_basis(sign * grad, True, 5, "eigh", None, 0)
        assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()
