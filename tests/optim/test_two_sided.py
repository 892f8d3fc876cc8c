"""Both bases are the leading singular vectors, whichever side is decomposed."""

import pytest
import torch
from steps import full, part  # type: ignore[import-not-found]  # on pytest's path
from torch import Tensor

from lowmem.optim.bases import Solver
from lowmem.optim.formats import State, tensor
from lowmem.optim.place import Place
from lowmem.optim.two_sided import TwoSided, basis_of_side

SHAPES = {"tall": (40, 15), "wide": (15, 40), "square": (20, 20)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
RANK = 4


def gradient(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Singular values 1, 1/2, 1/3, ...: well separated."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    return (left / torch.arange(1, min(shape) + 1) @ right).float()


def refreshed(projector: TwoSided, grad: Tensor) -> State:
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    return state


@every_shape
@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_exact_solvers_give_the_thin_svd(shape: tuple[int, int], solver: Solver) -> None:
    grad = gradient(shape)
    state = refreshed(TwoSided(RANK, solver), grad)
    left, values, right = torch.linalg.svd(grad.double(), full_matrices=False)
    low = TwoSided(RANK).down(grad, state).double()
    for key, wanted in (("left.basis", left[:, :RANK]), ("right.basis", right[:RANK].T)):
        overlap = (tensor(state, key).double().T @ wanted).abs()
        torch.testing.assert_close(overlap, torch.eye(RANK).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(low.abs(), values[:RANK].diag(), atol=1e-6, rtol=0)


@every_shape
def test_iteration_captures_nearly_as_much(shape: tuple[int, int]) -> None:
    grad = gradient(shape)
    energies = [
        tensor(refreshed(TwoSided(RANK, solver), grad), "log.energy").item()
        for solver in ("iteration", "svd")
    ]
    assert energies[0] > 0.98 * energies[1]


@every_shape
@pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])
def test_a_refresh_keeps_the_signs_of_both_sides(shape: tuple[int, int], solver: Solver) -> None:
    projector, grad = TwoSided(RANK, solver), gradient(shape)
    state = refreshed(projector, grad)
    state["step"] = 5
    old = {key: tensor(state, key).clone() for key in ("left.basis", "right.basis")}
    projector.refresh(-grad + 1e-3 * gradient(shape, seed=1), state)
    for key, before in old.items():
        assert ((tensor(state, key) * before).sum(dim=0) > 0.9).all()


@every_shape
def test_down_and_up_are_the_two_products(shape: tuple[int, int]) -> None:
    projector, grad = TwoSided(RANK), gradient(shape)
    state = refreshed(projector, grad)
    left, right = (tensor(state, f"{side}.basis").double() for side in ("left", "right"))
    low = projector.down(grad, state)
    torch.testing.assert_close(low.double(), left.T @ grad.double() @ right, atol=1e-6, rtol=0)
    back = left @ low.double() @ right.T
    step = projector.up(low, state)
    torch.testing.assert_close(full(step, shape).double(), back, atol=1e-6, rtol=0)
    torch.testing.assert_close(part(step, shape, 3, 9).double(), back[3:9], atol=1e-6, rtol=0)


@every_shape
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_either_side_alone_is_exact(shape: tuple[int, int], right: bool, solver: Solver) -> None:
    grad = gradient(shape)
    basis, usable = basis_of_side(grad, right, RANK, solver, seed=0)
    left_vectors, _, right_vectors = torch.linalg.svd(grad, full_matrices=False)
    wanted = right_vectors[:RANK].T if right else left_vectors[:, :RANK]
    assert usable
    torch.testing.assert_close((basis.T @ wanted).abs(), torch.eye(RANK), atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])
def test_a_gradient_that_is_no_number_leaves_both_bases(solver: Solver) -> None:
    projector, grad = TwoSided(RANK, solver), gradient((20, 12))
    state = refreshed(projector, grad)
    state["step"] = 5
    old = {key: tensor(state, key).clone() for key in ("left.basis", "right.basis")}
    grad[3, 4] = float("inf")
    projector.refresh(grad, state)
    assert all(torch.equal(before, tensor(state, key)) for key, before in old.items())
    assert tensor(state, "log.kept_bases") > 0
