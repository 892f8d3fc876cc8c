"""The battery: what every method must keep, in every format and update mode.

A new method adds one line to CASES.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.method import Method, Projected
from lowmem.optim.methods import METHODS, build_method
from lowmem.optim.optimizer import Optimizer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw-bf16": ("adamw", {"states": "bf16"}),
    "adamw-8bit": ("adamw", {"states": "8bit"}),
    "adam8bit": ("adam8bit", {"min_8bit": 0}),
    "galore": ("galore", {"rank": 4, "gap": 3}),
    "galore-left": ("galore", {"rank": 4, "gap": 3, "side": "left"}),
    "galore-reverse": ("galore", {"rank": 4, "gap": 3, "side": "reverse_std"}),
    "galore-bf16": ("galore", {"rank": 4, "gap": 3, "states": "bf16"}),
    "galore-8bit": ("galore", {"rank": 4, "gap": 3, "states": "8bit", "min_8bit": 0}),
}
SHAPES = {
    "tall": (24, 10),
    "wide": (10, 24),
    "square": (12, 12),
    "row": (1, 16),
    "small": (3, 2),  # rank above the side
    "large": (700, 40),  # more than one quantisation block per row group
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case: str) -> Method:
    name, options = CASES[case]
    return build_method(name, options)


def test_every_method_is_in_the_battery() -> None:
    assert {name for name, _ in CASES.values()} == set(METHODS)


def weights_and_gradients(
    updates: int, micro: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[list[dict[str, Tensor]]]]:
    generator = torch.Generator().manual_seed(7)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shapes: dict[str, tuple[int, ...]] = {**SHAPES, "vector": (33,)}
    weights = {name: draw(shape) for name, shape in shapes.items()}
    gradients = [
        [{name: draw(shape) for name, shape in shapes.items()} for _ in range(micro)]
        for _ in range(updates)
    ]
    return weights, gradients


def optimizer_of(case: str, weights: dict[str, Tensor], mode: Any) -> Optimizer:
    method = make(case)
    optimizer = Optimizer(mode, seed=11)
    for name, weight in weights.items():
        rest = method.rest if isinstance(method, Projected) else method
        optimizer.add(name, weight, rest if weight.ndim == 1 else method, 0.1)
    return optimizer


def run(
    optimizer: Optimizer,
    gradients: list[list[dict[str, Tensor]]],
    reverse: bool = False,
    change: Callable[[Tensor], Tensor] = Tensor.clone,
) -> None:
    for micro_batches in gradients:
        optimizer.begin(0.01, len(micro_batches))
        for batch in micro_batches:
            for name in reversed(batch) if reverse else batch:
                optimizer.receive(name, change(batch[name]))
        optimizer.step()


def final_weights(case: str, mode: str, dtype: torch.dtype, **how: Any) -> dict[str, Tensor]:
    weights, gradients = weights_and_gradients(7, dtype=dtype)
    run(optimizer_of(case, weights, mode), gradients, **how)
    return weights


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_mode_and_order_of_arrival_change_nothing(case: str, dtype: torch.dtype) -> None:
    plain = final_weights(case, "unfused", dtype)
    for mode in ("fused", "fused+subspace"):
        other = final_weights(case, mode, dtype, reverse=True)
        assert all(torch.equal(plain[name], other[name]) for name in plain)


@every_case
@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
def test_accumulating_equals_the_sum_of_gradients(case: str, mode: str) -> None:
    weights, gradients = weights_and_gradients(6, micro=4)
    for micro_batches in gradients[::3]:  # a refresh of fused+subspace sees only the first
        # Twice the first in all, exactly: vectors beyond the gradient's rank stay the same ones.
        for batch, share in zip(micro_batches[1:], (0.5, 0.25, 0.25), strict=True):
            batch.update({name: micro_batches[0][name] * share for name in batch})
    whole = [
        [{name: sum((b[name] for b in micro[1:]), micro[0][name]) for name in micro[0]}]
        for micro in gradients
    ]
    expected = {name: weight.clone() for name, weight in weights.items()}
    run(optimizer_of(case, weights, mode), gradients)
    run(optimizer_of(case, expected, mode), whole)
    # 8-bit and bf16 moments: a sum that differs in the last bit may fall into the next code.
    # Adam divides by the root of a fresh second moment: 6 updates of 0.01 in float32 give 1e-5.
    tolerance = 2e-4 if "8bit" in case or "bf16" in case else 1e-5
    for name, weight in weights.items():
        if (case, name) == ("galore-reverse", "row"):
            continue  # 4 vectors of a gradient of rank 1: 3 are arbitrary
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=0)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_bytes_equal_real_bytes(case: str, dtype: torch.dtype) -> None:
    weights, gradients = weights_and_gradients(1, dtype=dtype)
    on_meta = optimizer_of(case, {n: w.to("meta") for n, w in weights.items()}, "unfused")
    real = optimizer_of(case, weights, "unfused")
    run(real, gradients)  # nothing may be allocated lazily either
    sizes = [{key: value.nbytes for key, value in each.state_tensors()} for each in (on_meta, real)]
    assert sizes[0] == sizes[1]
    assert on_meta.state_numbers().keys() == real.state_numbers().keys()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_meta_step_runs(case: str, dtype: torch.dtype) -> None:
    weights, gradients = weights_and_gradients(2, micro=2, dtype=dtype)
    optimizer = optimizer_of(case, {n: w.to("meta") for n, w in weights.items()}, "unfused")
    run(optimizer, gradients, change=lambda grad: grad.to("meta"))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_restored_state_continues_bit_for_bit(case: str, dtype: torch.dtype, stop: int) -> None:
    expected = final_weights(case, "fused", dtype)
    weights, gradients = weights_and_gradients(7, dtype=dtype)
    first = optimizer_of(case, weights, "fused")
    run(first, gradients[:stop])
    tensors = {key: value.clone() for key, value in first.state_tensors()}
    second = optimizer_of(case, weights, "fused")
    second.restore(iter(tensors.items()), first.state_numbers(), first.updates)
    run(second, gradients[stop:])
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


@every_case
def test_state_is_plain_tensors_and_numbers(case: str) -> None:
    weights, gradients = weights_and_gradients(1)
    optimizer = optimizer_of(case, weights, "fused")
    run(optimizer, gradients)
    for slot in optimizer.slots.values():
        assert all(type(value) in (Tensor, int, float) for value in slot.state.values())


@every_case
def test_zero_gradients_move_nothing_and_leave_no_nan(case: str) -> None:
    weights, gradients = weights_and_gradients(3)
    before = {name: weight.clone() for name, weight in weights.items()}
    optimizer = optimizer_of(case, weights, "fused")
    for slot in optimizer.slots.values():
        slot.weight_decay = 0.0
    run(optimizer, gradients, change=torch.zeros_like)
    assert all(torch.equal(before[name], weights[name]) for name in before)
    run(optimizer, gradients)  # and the next gradients are followed
    assert all(not torch.equal(before[name], weights[name]) for name in before)
    assert all(weight.isfinite().all() for weight in weights.values())


@every_case
def test_a_non_finite_gradient_does_not_raise_or_spoil_the_basis(case: str) -> None:
    weights, gradients = weights_and_gradients(1)
    optimizer = optimizer_of(case, weights, "fused")
    run(optimizer, gradients, change=lambda grad: grad * float("nan"))
    for key, value in optimizer.state_tensors():
        if key.endswith("/basis"):
            assert value.isfinite().all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quadratic_loss_falls(case: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(30, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    weight = torch.zeros(30, 20, dtype=dtype)
    optimizer = Optimizer("fused", seed=5)
    optimizer.add("weight", weight, make(case), 0.0)
    for update in range(300):
        optimizer.begin(0.4 * (1 - update / 300), 1)
        optimizer.receive("weight", (weight.float() - target).to(dtype))
    assert (weight.float() - target).norm() < 0.1 * target.norm()
