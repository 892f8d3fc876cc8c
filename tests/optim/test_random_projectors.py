"""Random projections: of the right distribution, found again instead of stored."""

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State
from lowmem.optim.place import Place
from lowmem.optim.random_projectors import RandomNormal
from tests.optim.steps import full

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1)]


def started(
    shape: tuple[int, int], rank: int | float, seed: int = 1, draws: int = 1
) -> tuple[RandomNormal, State]:
    projector, state = RandomNormal(rank), State(step=0, seed=seed)
    grad = torch.zeros(shape)
    projector.init(state, grad, Place())
    for _ in range(draws):
        projector.refresh(grad, state)
    return projector, state


def basis(shape: tuple[int, int], rank: int, seed: int = 1, draws: int = 1) -> Tensor:
    projector, state = started(shape, rank, seed, draws)
    return projector.basis(state)


def test_entries_are_independent_normals_of_variance_one_over_rank() -> None:
    drawn = basis((2000, 300), 64)
    assert drawn.shape == (300, 64)
    entries = drawn.double() * 8
    # 19200 entries: mean within 4 / sqrt(19200), variance and fourth moment likewise.
    assert abs(entries.mean()) < 0.03
    assert abs(entries.var() - 1) < 0.04
    assert abs((entries**4).mean() - 3) < 0.3
    correlations = entries.T @ entries / 300 - torch.eye(64, dtype=torch.float64)
    assert correlations.abs().max() < 6 * 2**0.5 / 300**0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shorter_side_is_projected_and_rank_is_clipped_to_it(shape: tuple[int, int]) -> None:
    """Beyond it, the state would be larger than that of Adam."""
    projector, state = started(shape, 100)
    low = projector.down(torch.ones(shape), state)
    assert state["right"] == int(shape[0] >= shape[1])  # a square is tall: rows are its channels
    assert projector.basis(state).shape == (min(shape), min(shape))
    assert low.shape == shape


def test_a_fraction_is_one_of_the_shorter_side() -> None:
    assert started((40, 12), 0.25)[1]["rank"] == 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_down_and_up_are_products_with_the_same_matrix(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    projector, state = started(shape, 2)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    matrix = projector.basis(state).double()
    low = projector.down(grad, state)
    expected = grad.double() @ matrix if state["right"] else matrix.T @ grad.double()
    tolerance = 1e-6 if dtype == torch.float32 else 0.05  # bf16: 3 rounded factors, 8 bits each
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), expected, atol=tolerance, rtol=0)
    back = full(projector.up(low.float(), state), shape).double()
    again = low.double() @ matrix.T if state["right"] else matrix @ low.double()
    torch.testing.assert_close(back, again, atol=1e-6, rtol=0)


def test_nothing_is_stored_but_numbers_and_they_give_the_same_matrix_again() -> None:
    projector, state = started((30, 8), 4, draws=3)
    assert all(type(value) is int for value in state.values())
    assert torch.equal(projector.basis(state), projector.basis(state))
    assert torch.equal(projector.basis(dict(state)), projector.basis(state))


def test_every_draw_and_every_seed_has_its_own_matrix() -> None:
    drawn = [basis((30, 8), 4, seed, draws) for seed in (1, 2, 3) for draws in (1, 2, 3)]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert (one - other).abs().mean() > 0.2
