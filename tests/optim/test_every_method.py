"""The battery: what every method must keep, in every format and update mode.

A new method adds one line to CASES.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.method import ByRole
from lowmem.optim.methods import METHODS, build_method, method_spec
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.restore import restore_states

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
    "galore-eigh": ("galore", {"rank": 4, "gap": 3, "solver": "eigh", "staggered": False}),
    "galore-svd": ("galore", {"rank": 4, "gap": 3, "solver": "svd", "on_refresh": "reset"}),
    "galore-rotate": ("galore", {"rank": 4, "gap": 3, "on_refresh": "rotate"}),
    "q_apollo": ("q_apollo", {"rank": 4, "gap": 3}),
    "q_apollo-rest": ("q_apollo", {"rank": 4, "rest_states": "8bit", "min_8bit": 0}),
    "q_apollo_mini": ("q_apollo_mini", {"gap": 3, "scale": 1.0}),
    "q_galore-8bit": ("q_galore", {"rank": 4, "gap": 3, "basis_group": 16, "min_8bit": 0}),
    "q_galore-lazy": ("q_galore", {"rank": 4, "gap": 3, "queue": 1, "similarity": "first"}),
    "q_galore-rotate": ("q_galore", {"rank": 4, "gap": 3, "basis_bits": 8, "on_refresh": "rotate"}),
    "q_galore-float-basis": ("q_galore", {"rank": 4, "gap": 3, "queue": 1, "basis_bits": 32}),
    "fira": ("fira", {"rank": 4, "gap": 3, "alpha": 1.0}),
    "fira-reverse": ("fira", {"rank": 4, "gap": 3, "side": "reverse_std", "form": "paper"}),
    "fira-left": ("fira", {"rank": 4, "gap": 3, "side": "left", "solver": "svd"}),
    "fira-rotate": ("fira", {"rank": 4, "gap": 3, "on_refresh": "rotate", "states": "bf16"}),
    "fira-8bit": ("fira", {"rank": 4, "gap": 3, "states": "8bit", "min_8bit": 0}),
    "apollo": ("apollo", {"rank": 4, "gap": 3}),
    "apollo-svd": ("apollo", {"rank": 4, "gap": 3, "projection": "svd", "per": "tensor"}),
    "apollo-reset": ("apollo", {"rank": 4, "gap": 3, "on_refresh": "reset", "bias": "inside"}),
    "apollo-bf16": ("apollo", {"rank": 4, "gap": 3, "states": "bf16"}),
    "apollo-8bit": ("apollo", {"rank": 4, "gap": 3, "states": "8bit", "min_8bit": 0}),
    "apollo_mini": ("apollo_mini", {"gap": 3, "scale": 1.0}),
    "spam": ("spam", {"period": 4, "settle": 2, "warmup": 2, "threshold": 2.0}),
    "spam-8bit": ("spam", {"period": 100, "settle": 2, "states": "8bit", "min_8bit": 0}),
    "stable_spam": ("stable_spam", {"period": 4, "total": 300}),
    "stable_spam-released": ("stable_spam", {"period": 40, "released_order": True}),
    "stable_spam-8bit": ("stable_spam", {"states": "8bit", "min_8bit": 0}),
    "sgd_sai": ("sgd_sai", {}),
    "sgd_sai-bf16": ("sgd_sai", {"states": "bf16"}),
    "adam_mini": ("adam_mini", {}),
    "adam_mini-8bit": ("adam_mini", {"states": "8bit", "min_8bit": 0}),
    "scale": ("scale", {}),
    "racs": ("racs", {"scale": 0.5}),
    "adabelief": ("adabelief", {}),
    "adabelief-8bit": ("adabelief", {"states": "8bit", "min_8bit": 0}),
    "exadam": ("exadam", {}),
    "exadam-bf16": ("exadam", {"states": "bf16"}),
    "adamp": ("adamp", {"delta": 0.5}),
    "adamp-8bit": ("adamp", {"states": "8bit", "min_8bit": 0}),
    "diffgrad": ("diffgrad", {}),
    "diffgrad-8bit": ("diffgrad", {"states": "8bit", "min_8bit": 0}),
    "magma": ("magma", {"survival": 0.9}),
    "magma-galore": (
        "magma",
        {
            "base": "galore",
            "base_options": {"rank": 4, "gap": 3, "scale": 1.0, "staggered": False},
            "survival": 0.9,
        },
    ),
    # lam is absolute, and the gradients here are a thousand times those of a model; r x r numbers
    # of GaLore's size would not go far enough.
    "natural_galore": (
        "natural_galore",
        {"rank": 4, "gap": 3, "history": 3, "lam": 1e3, "scale": 1.0},
    ),
    "natural_galore-one": (
        "natural_galore",
        {"rank": 4, "gap": 3, "two_sided": False, "lam": 1e3, "on_refresh": "reset"},
    ),
    "natural_galore-bf16": (
        "natural_galore",
        {"rank": 4, "gap": 3, "history": 3, "history_states": "bf16", "on_refresh": "rotate"}
        | {"lam": 1e3, "scale": 1.0},
    ),
    "natural_galore-8bit": (
        "natural_galore",
        {"rank": 4, "gap": 3, "states": "8bit", "history_states": "8bit", "min_8bit": 0}
        | {"on_refresh": "clear", "relative_lam": True, "lam": 1e2, "scale": 1.0},
    ),
    "cosmos": ("cosmos", {"rank": 4, "newton_schulz": "fp32"}),
    "cosmos-std": ("cosmos", {"rank": 4, "side": "std", "momentum_form": "average"}),
    "cosmos-8bit": ("cosmos", {"rank": 4, "states": "8bit", "min_8bit": 0}),
    "muon": ("muon", {"newton_schulz": "fp32"}),
    "frugal": ("frugal", {"gap": 3}),
    "frugal-mirror": ("frugal", {"gap": 2, "order": "mirror", "density": 0.5, "states": "bf16"}),
    "frugal-random": ("frugal", {"gap": 2, "order": "random", "density": 0.5, "base": "lion"}),
    "frugal-blocks-8bit": ("frugal", {"gap": 2, "density": 0.5, "states": "8bit", "min_8bit": 0}),
    "frugal-svd": ("frugal", {"projection": "svd", "gap": 3}),
    "frugal-svd-reverse": ("frugal", {"projection": "svd", "gap": 3, "side": "reverse_std"}),
    # A larger eps: right after a refresh A'GB is triangular, and Adam makes steps of its zeros.
    "frugal-svd-full": ("frugal", {"projection": "svd", "gap": 3, "side": "full", "eps": 1e-3}),
    "frugal-no": ("frugal", {"projection": "svd", "gap": 3, "density": 0.7, "state_free": "no"}),
    "frugal-vectors": ("frugal", {"projection": "random", "gap": 3, "state_free": "sgd"}),
    "frugal-pairs": ("frugal", {"projection": "random", "gap": 3, "side": "full"}),
    "frugal-randperm": ("frugal", {"projection": "randperm", "gap": 3, "base": "sgd"}),
    "frugal-columns": ("frugal", {"projection": "columns", "gap": 3, "states": "bf16"}),
    "frugal-rows": ("frugal", {"projection": "rows", "gap": 3, "state_free": "sgd"}),
    "frugal-randk": ("frugal", {"projection": "randk", "gap": 3, "states": "8bit", "min_8bit": 0}),
    "frugal-nothing": ("frugal", {"density": 0.0}),
    "lion": ("lion", {}),
    "lion-bf16": ("lion", {"states": "bf16"}),
    "lion-8bit": ("lion", {"states": "8bit", "min_8bit": 0}),
    "muon-bf16": ("muon", {"states": "bf16", "adjustment": "spectral"}),
    "muon-8bit": ("muon", {"states": "8bit", "min_8bit": 0, "nesterov": False}),
    "soap": ("soap", {"frequency": 2}),
    "soap-one": ("soap", {"frequency": 2, "one_sided": True, "normalize": True}),
    "soap-bf16": ("soap", {"frequency": 2, "max_dim": 20, "states": "bf16"}),
    "soap-8bit": ("soap", {"frequency": 2, "states": "8bit", "min_8bit": 0}),
    "sophia": ("sophia", {}),
    "sophia-bf16": ("sophia", {"states": "bf16"}),
    "sophia-8bit": ("sophia", {"states": "8bit", "min_8bit": 0}),
    "adahessian": ("adahessian", {}),
    "adahessian-8bit": ("adahessian", {"states": "8bit", "min_8bit": 0}),
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


def make(case: str, together: bool = False) -> ByRole:
    """together: all matrices are refreshed in the same updates."""
    name, options = CASES[case]
    if together and "staggered" in method_spec(name).arguments:
        options = options | {"staggered": False}
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


def optimizer_of(
    case: str, weights: dict[str, Tensor], mode: Any, together: bool = False
) -> Optimizer:
    method = make(case, together)
    optimizer = Optimizer(mode, seed=11)
    for index, (name, weight) in enumerate(weights.items()):
        own = method.other if weight.ndim == 1 else method.matrix
        optimizer.add(name, weight, own, 0.1, Place(0, "mlp.up", index, len(weights), 4))
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
    run(optimizer_of(case, weights, mode, together=True), gradients)
    run(optimizer_of(case, expected, mode, together=True), whole)
    # 8-bit and bf16 moments: a sum that differs in the last bit may fall into the next code.
    # Adam divides by the root of a fresh second moment: 6 updates of 0.01 in float32 give 2e-5.
    tolerance = 2e-4 if "8bit" in case or "bf16" in case else 2e-5
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
    restore_states(second, iter(tensors.items()), first.state_numbers(), first.updates)
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
    optimizer.add("weight", weight, make(case).matrix, 0.0)
    for update in range(300):
        optimizer.begin(0.4 * (1 - update / 300), 1)
        optimizer.receive("weight", (weight.float() - target).to(dtype))
    assert (weight.float() - target).norm() < 0.1 * target.norm()
