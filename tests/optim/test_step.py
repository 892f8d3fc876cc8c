"""The gradients of an update, against one backward through the whole batch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather


class Regression(nn.Module):
    """A linear model with a squared error; notes what happens in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))
        self.order: list[str] = []

    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        self.order.append("forward")
        return (inputs @ self.weight - targets).square().sum() / total_tokens


def optimizer_of(model: Regression) -> Optimizer:
    optimizer = Optimizer("unfused", seed=0)
    optimizer.add("weight", model.weight, build_method("adamw", {}).matrix, 0.0)
    optimizer.attach(model)
    return optimizer


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator), torch.randn(12, generator=generator)


@pytest.mark.parametrize("size", [12, 5, 1])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_add_up_to_the_batch(size: int, clip: float | None) -> None:
    inputs, targets = data()
    whole = Regression()
    expected = whole.loss(inputs, targets, 12)
    expected.backward()
    gradient = whole.weight.grad
    assert gradient is not None

    model = Regression()
    optimizer = optimizer_of(model)
    parts = list(zip(inputs.split(size), targets.split(size), strict=True))
    loss, norm = gather(
        model, optimizer, iter(parts), count=len(parts), tokens=12, lr=0.5, clip=clip
    )
    # Sums of 12 terms in another order, in float32.
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm, gradient.norm(), atol=1e-5, rtol=0)  # before clipping
    kept = optimizer.slots["weight"].kept
    assert kept is not None
    torch.testing.assert_close(kept, gradient, atol=1e-5, rtol=0)
    assert torch.equal(model.weight, whole.weight)  # the step comes after
    assert optimizer.lr == 0.5
    optimizer.step()
    slot = optimizer.slots["weight"]
    moment = slot.state["exp_avg"]
    assert isinstance(moment, Tensor)
    scale = 1.0 if clip is None else clip / gradient.norm().item()
    torch.testing.assert_close(moment, 0.1 * scale * gradient, atol=1e-5, rtol=0)


def test_a_micro_batch_is_asked_for_when_the_one_before_is_done() -> None:
    """Only one of them is in memory at a time."""
    model = Regression()
    optimizer = optimizer_of(model)
    receive = optimizer.receive

    def noted(name: str, grad: Tensor) -> None:
        model.order.append("gradient")
        receive(name, grad)

    optimizer.receive = noted  # type: ignore[method-assign]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = data()
        for part in zip(inputs.split(4), targets.split(4), strict=True):
            model.order.append("batch")
            yield part

    gather(model, optimizer, batches(), count=3, tokens=12, lr=0.1, clip=None)
    assert model.order == ["batch", "forward", "gradient"] * 3
