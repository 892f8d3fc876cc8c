"""Back to full size, against the product written out in float64."""

from typing import Any

import pytest
import torch

from lowmem.optim.formats import State, tensor
from lowmem.optim.lifts import ProjectBack
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD
from tests.optim.steps import full, part

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_project_back_is_the_scaled_product(shape: tuple[int, int], side: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    gradient = torch.randn(shape, generator=generator)
    projector, lift = SVD(3, side), ProjectBack(0.25)
    state: State = {"step": 0, "seed": 1}
    projector.init(state, gradient, Place())
    projector.refresh(gradient, state)
    low = projector.down(gradient, state)
    direction = torch.randn(low.shape, generator=generator)
    basis = tensor(state, "basis").double()
    product = direction.double() @ basis.T if state["right"] else basis @ direction.double()
    step = lift(low, low, direction.clone(), 1.6, projector, state)
    expected = 0.25 * 1.6 * product
    # Sums of at most 3 products in float32.
    torch.testing.assert_close(full(step, shape).double(), expected, atol=1e-6, rtol=0)
    for row in range(shape[0]):
        torch.testing.assert_close(
            part(step, shape, row, row + 1).double(), expected[row : row + 1], atol=1e-6, rtol=0
        )


def test_project_back_needs_no_gradient_and_no_state() -> None:
    state: State = {}
    ProjectBack().init(state, torch.empty(3, 3))
    assert state == {}
    assert not ProjectBack().needs_gradient
