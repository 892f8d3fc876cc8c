"""Sophia and AdaHessian with given estimates: against the formulas and pytorch-optimizer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem.kernels.drawn_targets import drawn_targets
from lowmem.naming import seed_of
from lowmem.optim.curvature import Curved
from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.methods.adahessian import averaged
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (20, 7),
    "wide": (7, 20),
    "odd": (3, 5),
    "vector": (13,),
}
UPDATES, DECAY = 25, 0.1


def drawn(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Tensors of all shapes, several times."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def run_ours(
    method: str,
    options: dict[str, Any],
    weights: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    hessians: list[dict[str, Tensor]],
    lr: float,
    decay: float = DECAY,
) -> Optimizer:
    """Every estimate that is due is given, in pieces as `curvature.py` does it."""
    optimizer = Optimizer("unfused", seed=0)
    for name, weight in weights.items():
        own = build_method(method, options)
        optimizer.add(name, weight, own.other if weight.ndim == 1 else own.matrix, decay)
    for gradient, hessian in zip(gradients, hessians, strict=True):
        optimizer.begin(lr, 1)
        for name, slot in optimizer.slots.items():
            assert isinstance(slot.method, Curved)
            if slot.method.due(slot.state):
                whole = hessian[name].flatten().clone()
                slot.method.rule.curve(iter([(slice(0, len(whole)), whole)]), slot.state)
            optimizer.receive(name, gradient[name].clone())
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("gap", [1, 4, 10])
def test_sophia_follows_its_formula(gap: int) -> None:
    """Slowly, in float64. Estimates come before the updates 1, gap + 1, 2 gap + 1 ..."""
    first, *gradients = drawn(1 + UPDATES, 4)
    hessians = [{n: g.square() for n, g in each.items()} for each in drawn(UPDATES, 5)]
    options = {"betas": (0.9, 0.8), "gamma": 0.3, "eps": 1e-2, "gap": gap}
    ours = {name: weight.clone() for name, weight in first.items()}
    optimizer = run_ours("sophia", options, ours, gradients, hessians, lr=0.03)
    for name, weight in first.items():
        slow, m, h = weight.double(), torch.zeros(()), torch.zeros(())
        for k, (gradient, hessian) in enumerate(zip(gradients, hessians, strict=True)):
            m = 0.9 * m + 0.1 * gradient[name].double()
            if k % gap == 0:
                h = 0.8 * h + 0.2 * hessian[name].double()
            ratio = m / (0.3 * h).clamp(min=1e-2)
            slow = slow - 0.03 * DECAY * slow - 0.03 * ratio.clamp(-1, 1)
        # 25 updates in float32 on weights of size 1
        torch.testing.assert_close(ours[name].double(), slow, atol=2e-6, rtol=0)
        unclipped = tensor(optimizer.slots[name].state, "log.unclipped")
        torch.testing.assert_close(unclipped.double(), (ratio.abs() < 1).double().mean())
        assert 0.1 < unclipped < 0.9


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_adahessian_follows_its_formula(gap: int, power: float) -> None:
    """Magnitudes are averaged over runs of 4 of the flattened matrix, the last one shorter."""
    first, *gradients = drawn(1 + UPDATES, 4)
    hessians = drawn(UPDATES, 5)
    options = {"betas": (0.9, 0.8), "power": power, "eps": 1e-2, "gap": gap, "block": 4}
    ours = {name: weight.clone() for name, weight in first.items()}
    run_ours("adahessian", options, ours, gradients, hessians, lr=0.03)
    for name, weight in first.items():
        slow, m, v, estimates = weight.double(), torch.zeros(()), torch.zeros(()), 0
        for k, (gradient, hessian) in enumerate(zip(gradients, hessians, strict=True)):
            m = 0.9 * m + 0.1 * gradient[name].double()
            if k % gap == 0:
                runs = hessian[name].double().abs().flatten().split(1 if weight.ndim == 1 else 4)
                d = torch.cat([run.mean().expand(len(run)) for run in runs]).view(weight.shape)
                v, estimates = 0.8 * v + 0.2 * d**2, estimates + 1
            root = (v / (1 - 0.8**estimates)) ** (power / 2) + 1e-2
            slow = slow - 0.03 * DECAY * slow - 0.03 * m / (1 - 0.9 ** (k + 1)) / root
        # 25 updates in float32; a step may be 10 times lr
        torch.testing.assert_close(ours[name].double(), slow, atol=1e-5, rtol=0)


def theirs_after(
    cls: str,
    options: dict[str, Any],
    first: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    hessians: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    peer = pytest.importorskip("pytorch_optimizer", reason="a development extra")
    theirs = {name: nn.Parameter(weight.clone()) for name, weight in first.items()}
    reference = getattr(peer, cls)(list(theirs.values()), foreach=False, **options)
    for gradient, hessian in zip(gradients, hessians, strict=True):
        for name, weight in theirs.items():
            weight.grad = gradient[name].clone()
        reference.step(hessian=[hessian[name].clone() for name in theirs])
    return {name: weight.detach() for name, weight in theirs.items()}


def test_sophia_equals_pytorch_optimizer() -> None:
    """Their step is gamma times larger: clip(m / h, gamma) = gamma clip(m / (gamma h), 1)."""
    gamma = 0.05
    first, *gradients = drawn(1 + UPDATES, 4)
    hessians = [{n: 10 * g.square() for n, g in each.items()} for each in drawn(UPDATES, 5)]
    theirs = theirs_after(
        "SophiaH",
        {"lr": 0.4, "betas": (0.96, 0.99), "weight_decay": DECAY, "p": gamma, "eps": 1e-3},
        first,
        gradients,
        hessians,
    )
    options = {"gap": 1, "gamma": gamma, "eps": 1e-3 * gamma}
    run_ours("sophia", options, first, gradients, hessians, 0.4 * gamma, DECAY / gamma)
    for name, weight in first.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-6, rtol=0)  # float32, 25 updates


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_adahessian_equals_pytorch_optimizer(power: float) -> None:
    """They have no block average, and correct the first moment's bias only when asked."""
    first, *gradients = drawn(1 + UPDATES, 4)
    hessians = drawn(UPDATES, 5)
    options = {"lr": 0.02, "weight_decay": DECAY, "hessian_power": power, "eps": 1e-2}
    theirs = theirs_after("AdaHessian", options, first, gradients, hessians)
    own = {"block": 1, "power": power, "eps": 1e-2}
    run_ours("adahessian", own, first, gradients, hessians, 0.02)
    for name, weight in first.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-5, rtol=0)  # float32, 25 updates


def test_without_any_estimate_sophia_takes_signs_and_adahessian_the_momentum() -> None:
    first, *gradients = drawn(2, 4)
    for name, expected in (("sophia", torch.sign), ("adahessian", torch.clone)):
        ours = {key: weight.clone() for key, weight in first.items()}
        optimizer = Optimizer("fused", seed=0)
        for key, weight in ours.items():
            optimizer.add(key, weight, build_method(name, {}).matrix, 0.0)
        optimizer.begin(0.01, 1)
        for key, gradient in gradients[0].items():
            optimizer.receive(key, gradient.clone())
            moved = first[key] - 0.01 * expected(gradient)
            torch.testing.assert_close(ours[key], moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("method", ["sophia", "adahessian"])
def test_low_precision_states_stay_near_float32(method: str, states: str) -> None:
    """300 estimates that each change the average by less than half a bf16 digit are not lost."""
    first = {"weight": torch.zeros(8, 256)}
    gradients = [{"weight": torch.ones(8, 256)}] * 300
    hessians = [{"weight": torch.full((8, 256), 4.0)}] * 300
    found = {}
    for format in ("fp32", states):
        ours = {"weight": first["weight"].clone()}
        options = {"gap": 1, "states": format, "min_8bit": 0, "betas": (0.9, 0.999)}
        options |= {"gamma": 0.5} if method == "sophia" else {}
        run_ours(method, options, ours, gradients, hessians, 1e-3, 0.0)
        found[format] = ours["weight"].mean()
    # Stochastic rounding is exact on average; 8-bit codes of equal elements are their scale.
    torch.testing.assert_close(found[states], found["fp32"], rtol=0.01, atol=0)


class Softmax(nn.Module):
    """Linear logits over 7 words."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        logits = inputs @ self.weight.t()
        return functional.cross_entropy(logits, targets, reduction="sum") / total_tokens

    def drawn_loss(self, inputs: Tensor, targets: Tensor, total_tokens: int, seed: int) -> Tensor:
        drawn = drawn_targets(inputs, self.weight.detach(), targets, seed)
        return self.loss(inputs, drawn, total_tokens)


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [7, 5]])
def test_sophia_squares_the_mean_gradient_of_the_whole_update(sizes: list[int]) -> None:
    """Not the mean of the micro-batches' squares; times all tokens, at the weights before the
    step; and not clipped with the gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 5, generator=generator)
    targets = torch.randint(0, 7, (12,), generator=generator)
    start = torch.randn(7, 5, generator=generator)
    model = Softmax(start)
    optimizer = Optimizer("unfused", seed=3)
    optimizer.add("weight", model.weight, build_method("sophia", {"gap": 10}).matrix, 0.0)
    optimizer.attach(model)
    parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    gather(model, optimizer, parts, count=len(parts), tokens=12, lr=0.1, clip=1e-3)
    optimizer.step()

    drawn = [
        drawn_targets(x, start, y, seed_of(3, f"targets/{index}", 1))
        for index, (x, y) in enumerate(parts)
    ]
    slow = start.double().requires_grad_()
    functional.cross_entropy(inputs.double() @ slow.t(), torch.cat(drawn)).backward()
    assert slow.grad is not None
    expected = 0.01 * 12 * slow.grad.square()
    found = tensor(optimizer.slots["weight"].state, "hessian")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)  # float32 sums


@pytest.mark.parametrize(("length", "block"), [(256, 32), (100, 32), (5, 8), (7, 1)])
def test_averages_keep_the_sum(length: int, block: int) -> None:
    values = torch.rand(length, dtype=torch.float64)
    found = averaged(values.clone(), block)
    torch.testing.assert_close(found.sum(), values.sum())
    torch.testing.assert_close(found[0], values[:block].mean())
    torch.testing.assert_close(found[-1], values[(length - 1) // block * block :].mean())
