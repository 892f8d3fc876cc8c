"""A basis in 4-bit codes: its bytes, its error, and how like two of them are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, QuantizedSVD
from tests.optim.steps import full

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1), (40, 24)]
FINE: dict[str, Any] = {"solver": "eigh"}


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refreshed(projector: SVD, grad: Tensor, state: State | None = None) -> State:
    """The state after a refresh; a new one, or the given one an update later."""
    if state is None:
        state = {"step": 0, "seed": 1}
        projector.init(state, grad, Place())
    projector.refresh(grad, state)
    state["step"] = 1
    return state


@pytest.mark.parametrize("shape", [*SHAPES, (300, 300)])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 256), (8, 16)])
def test_two_codes_share_a_byte(shape: tuple[int, int], bits: Any, group: int) -> None:
    weight = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    state: State = {"step": 0, "seed": 1}
    QuantizedSVD(3, bits=bits, group=group).init(state, weight, Place())
    elements = min(shape) * min(3, *shape)
    assert tensor(state, "basis.codes").nbytes == -(-elements * bits // 8)
    assert tensor(state, "basis.scales").nbytes == 4 * -(-elements // group)
    assert tensor(state, "basis.zeros").nbytes == 4 * -(-elements // group)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("bits", "top"), [(4, 15), (8, 255)])
def test_a_basis_is_the_nearest_in_codes(
    shape: tuple[int, int], side: Any, bits: Any, top: int
) -> None:
    grad = draw(shape)
    coded = QuantizedSVD(3, side, **FINE, bits=bits, group=8)
    exact = SVD(3, side, **FINE)
    found = coded.basis(refreshed(coded, grad))
    wanted = exact.basis(refreshed(exact, grad))
    # A code is at most 2/top, with the zero point's rounding an end may be a whole one away.
    assert (found - wanted).abs().max() <= 2.01 / top


@pytest.mark.parametrize("side", ["left", "right"])
def test_groups_run_along_the_published_rows(side: Any) -> None:
    """(r, s) on the right and (s, r) on the left: one tiny row has a scale of its own."""
    projector = QuantizedSVD(2, side, group=8)
    state = refreshed(projector, draw((8, 8)))
    new = torch.ones(8, 2)
    new.view(-1)[0] = 1e-3
    projector.store(state, new, torch.ones((), dtype=torch.bool))
    assert (tensor(state, "basis.scales") > 0.05).sum() == 2
    new = torch.ones(8, 2)
    (new[:, 1] if side == "right" else new[4:]).mul_(1e-3)
    projector.store(state, new, torch.ones((), dtype=torch.bool))
    assert (tensor(state, "basis.scales") > 0.05).sum() == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_use_the_basis_in_codes(shape: tuple[int, int]) -> None:
    grad = draw(shape)
    projector = QuantizedSVD(2, group=8)
    state = refreshed(projector, grad)
    basis = projector.basis(state).double()
    outer = basis @ basis.T
    expected = grad.double() @ outer if state["right"] else outer @ grad.double()
    found = full(projector.up(projector.down(grad, state), state), shape)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["svd", "eigh", "iteration"])
def test_signs_are_aligned_with_the_previous_codes(solver: Any) -> None:
    projector = QuantizedSVD(3, solver=solver, similarity="first")
    grad = draw((30, 3)) @ draw((3, 20), 1)
    state = refreshed(projector, grad)
    before = projector.basis(state)
    refreshed(projector, -grad, state)
    assert ((projector.basis(state) * before).sum(dim=0) > 0.9).all()
    # The released rule would measure -1 here, or 1, as the decomposition pleases.
    assert tensor(state, "log.similarity") > 0.99


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_non_finite_gradient_keeps_every_bit(bits: Any) -> None:
    projector = QuantizedSVD(3, bits=bits, similarity="first")
    grad = draw((10, 6))
    state = refreshed(projector, grad)
    before = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and "log" not in k}
    grad[2, 3] = float("inf")
    refreshed(projector, grad, state)
    assert all(torch.equal(value, tensor(state, key)) for key, value in before.items())
    assert tensor(state, "log.similarity") == 0  # so that failures never lengthen a gap
    assert tensor(state, "log.kept_bases") == 1


def similarity(one: Tensor, two: Tensor, **how: Any) -> float:
    projector = QuantizedSVD(4, **FINE, **how)
    return tensor(refreshed(projector, two, refreshed(projector, one)), "log.similarity").item()


def planted(directions: Tensor, strengths: list[float], seed: int) -> Tensor:
    """A gradient (200, s) whose right singular vectors are these orthonormal columns."""
    left, _ = torch.linalg.qr(draw((200, len(strengths)), seed))
    return (left * torch.tensor(strengths)) @ directions.T


def test_captured_sees_the_whole_subspace_and_nothing_in_chance() -> None:
    q, _ = torch.linalg.qr(draw((64, 8)))
    same = planted(q[:, :4], [4.0, 3.0, 2.0, 1.0], 1)
    # The same subspace, its vectors in another order: the first ones have nothing in common.
    order = planted(q[:, [3, 2, 1, 0]], [4.0, 3.0, 2.0, 1.0], 2)
    other = planted(q[:, 4:], [4.0, 3.0, 2.0, 1.0], 3)
    assert similarity(same, order) > 0.99
    assert similarity(same, order, similarity="first") < 0.1
    assert similarity(same, other) < 0.1


@pytest.mark.parametrize("solver", ["svd", "eigh", "iteration"])
def test_captured_is_not_taken_in_by_a_solver_that_stays_where_it_is(solver: Any) -> None:
    """Of mere noise the old vectors capture what any would, however near the new ones are."""
    for shape in ((600, 64), (64, 600), (200, 200)):
        found = QuantizedSVD(16, solver=solver)
        state = refreshed(found, draw(shape))
        refreshed(found, draw(shape, 1), state)
        assert tensor(state, "log.similarity") < 0.25
        if solver == "iteration" and shape != (200, 200):
            assert tensor(state, "log.overlap") > 0.6  # of exact ones it is 16/64


@pytest.mark.parametrize("how", ["captured", "first"])
def test_similarity_of_one_vector_is_its_cosine(how: Any) -> None:
    q, _ = torch.linalg.qr(draw((150, 2)))
    one = planted(q[:, :1], [1.0], 1)
    two = planted(q[:, :1] * 0.6 + q[:, 1:] * 0.8, [1.0], 2)
    projector = QuantizedSVD(1, **FINE, bits=32, similarity=how)
    state = refreshed(projector, two, refreshed(projector, one))
    expected = 0.6 if how == "first" else ((0.36 - 1 / 150) / (1 - 1 / 150)) ** 0.5
    assert tensor(state, "log.similarity").item() == pytest.approx(expected, abs=1e-5)


def test_the_whole_space_never_changes() -> None:
    assert similarity(draw((200, 4)), draw((200, 4), 1)) == 1.0


def test_float32_without_codes_is_the_plain_projector() -> None:
    grad = draw((20, 12))
    plain, floats = SVD(4), QuantizedSVD(4, bits=32)
    states = [refreshed(plain, grad), refreshed(floats, grad)]
    assert torch.equal(plain.basis(states[0]), floats.basis(states[1]))
