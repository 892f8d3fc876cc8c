"""Muon against torch.optim.Muon and pytorch-optimizer's, and what its sheet warns of."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (20, 20), "row": (1, 9)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def final(weight: Tensor, grads: list[Tensor], decay: float = 0.1, **options: Any) -> Tensor:
    optimizer = Optimizer("fused", seed=1)
    optimizer.add("w", weight, build_method("muon", options).matrix, decay)
    for grad in grads:
        optimizer.begin(0.02, 1)
        optimizer.receive("w", grad.clone())
    return weight


@every_shape
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("original", "original"), ("match_rms", "match_rms_adamw")]
)
def test_muon_equals_torch(shape: tuple[int, int], nesterov: bool, ours: str, theirs: str) -> None:
    reference_weight = start(shape).requires_grad_()
    reference = torch.optim.Muon(
        [reference_weight], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs
    )
    grads = gradients(shape, 8)
    for grad in grads:
        reference_weight.grad = grad.clone()
        reference.step()
    weight = final(start(shape), grads, nesterov=nesterov, adjustment=ours)
    # Both round to bfloat16, at different places: 1 % of a step, whose entries are up to 0.02 adj.
    torch.testing.assert_close(weight, reference_weight.detach(), atol=3e-3, rtol=0)


@every_shape
def test_float32_follows_the_formula_in_its_other_form(shape: tuple[int, int]) -> None:
    """M <- mu M + G, U = G + mu M: the same directions."""
    M, weight = torch.zeros(shape, dtype=torch.float64), start(shape).double()
    grads = gradients(shape, 8)
    for grad in grads:
        M = 0.95 * M + grad.double()
        left, values, right = torch.linalg.svd(grad.double() + 0.95 * M, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        ratio = math.sqrt(shape[0] / shape[1])
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * ratio * left @ values.diag() @ right
    ours = final(start(shape), grads, newton_schulz="fp32", adjustment="spectral")
    torch.testing.assert_close(ours.double(), weight, atol=1e-5, rtol=0)  # 8 updates in float32


def test_muon_equals_pytorch_optimizer() -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason="a development extra")
    shape = (40, 16)
    theirs = start(shape).requires_grad_()
    group = {"params": [theirs], "use_muon": True}
    reference = peer.Muon([group], lr=0.02, weight_decay=0.1)
    grads = gradients(shape, 8)
    for grad in grads:
        theirs.grad = grad.clone()
        reference.step()
    ours = final(start(shape), grads, adjustment="original")
    torch.testing.assert_close(ours, theirs.detach(), atol=3e-3, rtol=0)  # as above


@every_shape
def test_the_size_of_gradients_has_no_effect(shape: tuple[int, int]) -> None:
    """So neither clipping nor a loss scale has one."""
    grads = gradients(shape, 5)
    small = final(start(shape), [grad * 2.0**-10 for grad in grads])
    assert torch.equal(small, final(start(shape), grads))


@pytest.mark.parametrize(
    ("adjustment", "shape", "factor"),
    [
        ("match_rms", (64, 256), 0.2 * 16),
        ("match_rms", (256, 64), 0.2 * 16),
        ("original", (64, 256), 1.0),
        ("original", (256, 64), 2.0),
        ("spectral", (64, 256), 0.5),
        ("spectral", (256, 64), 2.0),
    ],
)
def test_adjustments_differ_as_documented(
    adjustment: str, shape: tuple[int, int], factor: float
) -> None:
    grads = gradients(shape, 1)
    moved = final(torch.zeros(shape), grads, 0.0, adjustment=adjustment, newton_schulz="fp32")
    values = torch.linalg.svdvals(moved / 0.02)
    assert 0.6 * factor < values.min()
    assert values.max() < 1.25 * factor


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_gradient_is_left_as_it_was(precision: str) -> None:
    method = build_method("muon", {"newton_schulz": precision}).matrix
    grad = gradients((6, 5), 1)[0]
    before = grad.clone()
    method.update(grad, method.init(grad, Place()))
    assert torch.equal(grad, before)


def test_the_rest_is_adamw_at_its_share_of_the_rate_with_the_whole_decay() -> None:
    ours, theirs = start((17,)), start((17,)).requires_grad_()
    rate = 0.02 * 0.015
    reference = torch.optim.AdamW([theirs], lr=rate, betas=(0.9, 0.95), weight_decay=0.1 / 0.015)
    optimizer = Optimizer("fused", seed=1)
    optimizer.add("w", ours, build_method("muon", {"rest_lr_ratio": 0.015}).of("head"), 0.1)
    for grad in gradients((17,), 10):
        theirs.grad = grad.clone()
        reference.step()
        optimizer.begin(0.02, 1)
        optimizer.receive("w", grad.clone())
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_short_momentum_formats_stay_near_float32(states: str) -> None:
    grads = gradients((40, 16), 20)
    options: dict[str, Any] = {"newton_schulz": "fp32", "min_8bit": 0}
    exact = final(start((40, 16)), grads, **options) - start((40, 16))
    rounded = final(start((40, 16)), grads, states=states, **options) - start((40, 16))
    assert (rounded - exact).norm() < 0.05 * exact.norm()
