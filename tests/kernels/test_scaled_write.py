"""A scaled gradient written in one pass: the bits that row groups in plain PyTorch write."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import forced
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.rounding import round_into
from lowmem.kernels.scaled_write import Scaled
from lowmem.optim.weights import write
from tests.kernels.calls import Calls

SHAPES = [(1, 1), (1, 300), (300, 1), (9, 257), (33, 70), (0, 7)]
FORMS = ["fp32", "bf16", "int8-64", "int8-100"]
SCALES = {"row": 0, "column": 1, "whole": None}


def weight_of(form: str, shape: tuple[int, int], device: torch.device) -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    if form.startswith("int8"):
        return GroupedWeight.of(values.bfloat16(), int(form[5:]))
    return values.to(torch.float32 if form == "fp32" else torch.bfloat16)


def step_of(shape: tuple[int, int], along: str, dtype: torch.dtype, device: torch.device) -> Scaled:
    generator = torch.Generator().manual_seed(2)
    full = torch.randn(shape, generator=generator).to(dtype)
    kept = {"row": (shape[0], 1), "column": (1, shape[1]), "whole": (1, 1)}[along]
    return Scaled(full.to(device), torch.rand(kept, generator=generator).to(device), 0.7)


def stored(weight: Weight) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else [weight.codes, weight.scales, weight.zeros]


def both(weight: Any, step: Scaled, **options: Any) -> tuple[Weight, Weight]:
    """What the kernel and what row groups in plain PyTorch make of a weight."""
    other = copy.deepcopy(weight)
    given = {"lr": 0.3, "weight_decay": 0.1, "decay_first": False, "seed": 2**60 + 7} | options
    with Calls() as calls:
        write(weight, step, **given)
    names = [func._schema.name for func, _ in calls.kernels]
    assert names == ["lowmem::scaled_write" + ("" if isinstance(weight, Tensor) else "_codes")]
    with forced("reference"):
        write(other, step, **given)
    return weight, other


def equal(found: Weight, wanted: Weight) -> None:
    for ours, theirs in zip(stored(found), stored(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("along", SCALES)
def test_triton_writes_the_bits_of_row_groups(
    shape: tuple[int, int], form: str, along: str, triton_kernels: torch.device
) -> None:
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    step = step_of(shape, along, dtype, triton_kernels)
    equal(*both(weight_of(form, shape, triton_kernels), step))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{"decay_first": True}, {"weight_decay": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_comes_when_it_is_asked_for(
    form: str, options: dict[str, Any], dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    step = step_of((9, 70), "row", dtype, triton_kernels)
    equal(*both(weight_of(form, (9, 70), triton_kernels), step, **options))


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_what_is_not_finite_stays_where_it_is(form: str, triton_kernels: torch.device) -> None:
    step = step_of((4, 70), "column", torch.bfloat16, triton_kernels)
    step.full[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    step.full[1] = 1e-40
    weight = weight_of(form, (4, 70), triton_kernels)
    weight[1] = 1e-40
    found, wanted = both(weight, step)
    assert isinstance(found, Tensor)
    assert int(found.isfinite().logical_not().sum()) == 3
    equal(found, wanted)


@pytest.mark.parametrize("how", [{"noise": None}, {"span_zero": False}])
def test_codes_keep_their_rounding(how: dict[str, Any], triton_kernels: torch.device) -> None:
    weight = weight_of("int8-64", (9, 70), triton_kernels)
    for key, value in how.items():
        setattr(weight, key, value)
    equal(*both(weight, step_of((9, 70), "row", torch.float32, triton_kernels)))


def test_noise_of_another_kind_is_left_to_row_groups(triton_kernels: torch.device) -> None:
    weight = weight_of("int8-64", (9, 70), triton_kernels)
    weight.noise = lambda count, seed, offset, device: torch.zeros(count, device=device)
    with Calls() as calls:
        write(
            weight, step_of((9, 70), "row", torch.float32, triton_kernels),
            lr=0.3, weight_decay=0.0, decay_first=False, seed=1,
        )  # fmt: skip
    assert "lowmem::scaled_write_codes" not in [func._schema.name for func, _ in calls.kernels]


def test_steps_below_a_last_bit_move_the_weight_on_average(triton_kernels: torch.device) -> None:
    """A tenth of the spacing of bfloat16 at 1, in 64 updates of 1024 weights."""
    weight = torch.ones(8, 128, dtype=torch.bfloat16, device=triton_kernels)
    step = Scaled(torch.ones_like(weight), torch.ones(1, 1, device=triton_kernels), 2.0**-7 / 10)
    updates, lr = 16, 1.0
    for update in range(updates):
        assert step.write(weight, Descent(lr, seed=update))
    moved = (weight.double() - 1).mean().item() / 2.0**-7
    # The variance of a two-valued step is 0.1 * 0.9; four standard errors of 1024 weights.
    assert moved == pytest.approx(updates / 10, abs=4 * (updates * 0.09 / 1024) ** 0.5)


def test_the_reference_is_the_formula() -> None:
    """In float64; three rounded operations of float32."""
    step, weight = step_of((33, 70), "row", torch.float32, torch.device("cpu")), torch.ones(33, 70)
    exact = weight.double() - 0.3 * 0.7 * step.scales.double() * step.full.double()
    write(weight, step, lr=0.3, weight_decay=0.1, decay_first=False, seed=1)
    torch.testing.assert_close(weight.double(), exact * (1 - 0.03), rtol=0, atol=4e-7)
    rounded, wanted = torch.empty_like(weight, dtype=torch.bfloat16), weight.clone()
    round_into(rounded, wanted, seed=1)
    short = torch.ones(33, 70, dtype=torch.bfloat16)
    write(short, step, lr=0.3, weight_decay=0.1, decay_first=False, seed=1)
    assert torch.equal(short, rounded)
