"""SGD-SaI: its factor and the traps around it."""

import pytest
import torch

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.methods.trajectory import (
    DECAY,
    LR,
    SHAPES,
    gradients,
    optimizer_of,
    run,
    step,
)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (11,)])
def test_it_follows_its_formula(shape: tuple[int, ...], momentum: float) -> None:
    """Momentum 0 included, which the released code cannot do."""
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 8)
    method = build_method("sgd_sai", {"momentum": momentum}).matrix
    found = run(method, start, grads)
    snr = grads[0].double().norm() / (grads[0].double().std() + 1e-8)
    weight, buffer = start.double(), grads[0].double()
    for k, grad in enumerate(grads):
        if k:
            buffer = momentum * buffer + (1 - momentum) * grad.double()
        weight = weight * (1 - LR * DECAY) - LR * snr * buffer
    torch.testing.assert_close(found.double(), weight, atol=3e-6, rtol=0)  # steps of up to 0.5


def test_zero_first_gradients_do_not_freeze_the_tensor() -> None:
    weight = torch.ones(5, 6)
    optimizer = optimizer_of(build_method("sgd_sai", {}).matrix, weight, decay=0.0)
    first, second = gradients((5, 6), 2)
    for grad in (torch.zeros(5, 6), torch.zeros(5, 6), first, second):
        step(optimizer, grad)
    snr = tensor(optimizer.slots["weight"].state, "snr")
    torch.testing.assert_close(snr, first.norm() / first.std())
    assert (weight != 1).all()


def test_a_gradient_that_is_not_finite_does_not_decide() -> None:
    optimizer = optimizer_of(build_method("sgd_sai", {}).matrix, torch.ones(5, 6))
    first = gradients((5, 6), 1)[0]
    for grad in (first * float("inf"), first):
        step(optimizer, grad)
    snr = tensor(optimizer.slots["weight"].state, "snr")
    torch.testing.assert_close(snr, first.norm() / first.std())


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_element_has_no_deviation_and_a_factor_of_one(shape: tuple[int, ...]) -> None:
    optimizer = optimizer_of(build_method("sgd_sai", {}).matrix, torch.ones(shape))
    step(optimizer, torch.full(shape, -3.0))
    assert tensor(optimizer.slots["weight"].state, "snr") == 1


def test_the_factor_is_of_the_whole_batch() -> None:
    """Of the sum of micro-batches, not of the first of them."""
    grads = gradients((8, 4), 4)
    optimizer = Optimizer("unfused", seed=0)
    optimizer.add("weight", torch.ones(8, 4), build_method("sgd_sai", {}).matrix, 0.0)
    optimizer.begin(LR, 4)
    for grad in grads:
        optimizer.receive("weight", grad.clone())
    optimizer.step()
    batch = torch.stack(grads).sum(dim=0)
    snr = tensor(optimizer.slots["weight"].state, "snr")
    torch.testing.assert_close(snr, batch.norm() / batch.std())


def test_the_gradient_is_not_changed() -> None:
    method = build_method("sgd_sai", {}).matrix
    optimizer = optimizer_of(method, torch.ones(5, 6))
    grad = gradients((5, 6), 1)[0]
    kept = grad.clone()
    method.update(kept, optimizer.slots["weight"].state)
    assert torch.equal(kept, grad)
