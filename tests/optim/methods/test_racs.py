"""RACS against its algorithm in float64.

pytorch-optimizer's RACS is not compared: it averages the means of squares over rows and columns
instead of iterating equation 16 of the paper.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowmem.kernels import slices
from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.methods.racs import principal_pair
from tests.optim.methods.trajectory import DECAY, LR, SHAPES, gradients, optimizer_of, run, step


def pair(g: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Equation 16 with the matrices written out."""
    q = torch.ones(g.shape[0], dtype=g.dtype)
    s = torch.ones(g.shape[1], dtype=g.dtype)
    for _ in range(iterations):
        s = (g.T @ q.diag() @ g).diagonal() / q.diag().norm() ** 2
        q = (g @ s.diag() @ g.T).diagonal() / s.diag().norm() ** 2
    return q, s


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_follows_its_algorithm(shape: tuple[int, ...]) -> None:
    """With a gradient ten times as large on the way, which the limiter holds back."""
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 12)
    grads[5] *= 10.0
    found = run(build_method("racs", {"scale": 0.5}).matrix, start, grads)
    weight = start.double()
    q = torch.zeros(shape[0], dtype=torch.float64)
    s = torch.zeros(shape[1], dtype=torch.float64)
    phi = 0.0
    for k, grad in enumerate(grads):
        g = grad.double()
        new_q, new_s = pair(g, 5)
        q, s = 0.9 * q + 0.1 * new_q, 0.9 * s + 0.1 * new_s
        scaled = q.rsqrt().diag() @ g @ s.rsqrt().diag()
        norm = scaled.norm().item()
        eta = 1.01 / max(norm / phi, 1.01) if k else 1.0
        phi = eta * norm
        weight = weight * (1 - LR * DECAY) - LR * eta * 0.5 * scaled
    torch.testing.assert_close(found.double(), weight, atol=5e-6, rtol=0)  # steps of up to 0.1


def test_the_fixed_point_is_the_leading_singular_pair_of_the_squares() -> None:
    grad = gradients((12, 30), 1)[0]
    q, s = principal_pair(grad, 60)
    u, sigma, vh = torch.linalg.svd(grad.double() ** 2)
    expected = sigma[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(torch.outer(q, s).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6])
def test_the_size_of_the_gradient_does_not_matter(size: float) -> None:
    """Squares of squares leave float32 for gradients below 1e-11."""
    start, grads = torch.zeros(9, 14), gradients((9, 14), 6)
    method = build_method("racs", {}).matrix
    expected = run(method, start, grads)
    found = run(method, start, [grad * size for grad in grads])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_zero_gradient_does_not_close_the_limiter_for_ever() -> None:
    weight = torch.zeros(6, 8)
    optimizer = optimizer_of(build_method("racs", {}).matrix, weight, decay=0.0)
    step(optimizer, torch.zeros(6, 8))
    assert torch.equal(weight, torch.zeros(6, 8))
    step(optimizer, gradients((6, 8), 1)[0])
    assert (weight != 0).all()


def test_only_rows_columns_and_a_norm_are_kept() -> None:
    optimizer = optimizer_of(build_method("racs", {}).matrix, torch.zeros(20, 30))
    assert sum(value.numel() for _, value in optimizer.state_tensors()) == 20 + 30 + 1


def test_slicing_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    start, grads = torch.zeros(512, 40), gradients((512, 40), 4)
    method = build_method("racs", {"scale": 1.0}).matrix
    expected = run(method, start, grads)
    monkeypatch.setitem(slices.SLICE_ELEMENTS, "cpu", 2048)
    found = run(method, start, grads)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)  # another order of sums


def test_the_limiter_holds_the_norm_to_its_growth() -> None:
    optimizer = optimizer_of(build_method("racs", {"growth": 1.05}).matrix, torch.zeros(6, 8))
    norms = []
    for k, grad in enumerate(gradients((6, 8), 6)):
        step(optimizer, grad * (1 if k < 3 else 100))
        norms.append(tensor(optimizer.slots["weight"].state, "limited_norm").item())
    growth = [after / before for before, after in pairwise(norms)]
    assert growth[2] == pytest.approx(1.05)
    assert max(growth) <= 1.05 + 1e-5
