"""Scaled gradients, against the formulas of the papers written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.kernels.slices import SLICE_ELEMENTS
from lowmem.optim.channels import (
    ChannelScaling,
    Form,
    ScaledResidual,
    channel_factors,
    channel_norms,
)
from lowmem.optim.formats import State, number, tensor
from lowmem.optim.lifts import Lift
from lowmem.optim.limiters import NormGrowth
from lowmem.optim.place import Place
from lowmem.optim.projectors import SVD, Projector, Side
from lowmem.optim.random_projectors import RandomNormal
from lowmem.optim.weights import Step
from tests.optim.steps import full, part

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1), (3, 2)]
LARGE = [(700, 300), (300, 700)]  # several groups of rows
FACTOR = 1.7  # of bias correction
GROUP = 2**16  # elements


@pytest.fixture(autouse=True)
def groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", GROUP)


class Case:
    """A gradient, its projection, and some direction in the subspace."""

    def __init__(
        self,
        projector: Projector,
        lift: Lift,
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        self.shape, self.projector, self.lift = shape, projector, lift
        self.grad = torch.randn(shape, generator=generator).to(dtype)
        self.state: State = {"step": 0, "seed": 1}
        projector.init(self.state, self.grad, Place())
        projector.refresh(self.grad, self.state)
        lift.init(self.state, self.grad)
        self.low = projector.down(self.grad, self.state)
        self.direction = torch.randn(self.low.shape, generator=generator)

    def step(self) -> Step:
        args = self.grad, self.low, self.direction.clone(), FACTOR, self.projector, self.state
        return self.lift(*args)

    def back(self, low: Tensor) -> Tensor:
        basis = self.projector.basis(self.state).double()
        return low.double() @ basis.T if self.state["right"] else basis @ low.double()

    def factors(self) -> Tensor:
        axis = 1 if self.state["right"] else 0
        over, under = (
            x.double().square().sum(axis, keepdim=True).sqrt() for x in (self.direction, self.low)
        )
        return over / (under + 1e-8)


def close(found: Tensor, expected: Tensor, relative: float = 2e-6) -> None:
    """Float32 against float64, relative to the largest entry."""
    atol = relative * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_norms_are_those_of_rows_or_columns(
    shape: tuple[int, int], right: bool, dtype: torch.dtype
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = values.double().square().sum(int(right), keepdim=True).sqrt()
    found = channel_norms(values, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_factors_run_along_the_rank_axis_even_where_rank_is_the_longer(
    right: bool, rank: int
) -> None:
    generator = torch.Generator().manual_seed(rank)
    shape = (5, rank) if right else (rank, 5)
    direction, low = (torch.randn(shape, generator=generator) for _ in range(2))
    found = channel_factors(direction, low, right)
    assert found.shape == ((5, 1) if right else (1, 5))
    for channel in range(5):
        n, r = (x[channel] if right else x[:, channel] for x in (direction, low))
        assert found.view(-1)[channel].item() == pytest.approx(
            (n.norm() / (r.norm() + 1e-8)).item(), rel=1e-5
        )


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("alpha", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_scaled_residual_is_the_formula_of_its_form(
    shape: tuple[int, int], side: Side, alpha: float, form: Form
) -> None:
    lift = ScaledResidual(alpha, form)
    case = Case(SVD(3, side, "eigh"), lift, shape)
    grad, phi = case.grad.double(), case.factors()
    if form == "released":
        residual = phi * (grad - alpha * case.back(case.low))
        expected = alpha * case.back(case.direction) + residual
    else:
        residual = phi * (grad - case.back(case.low))
        expected = alpha * (case.back(case.direction) + residual)
    step = case.step()
    close(full(step, shape), FACTOR * expected)
    for row in range(0, shape[0], 150):
        close(part(step, shape, row, row + 1), FACTOR * expected[row : row + 1], 1e-5)
    # Where the subspace is everything, the norm of the rest is the rounding of its square.
    limit = 1e-3 * (phi * grad).norm() if min(shape) <= 3 else 1e-5 * residual.norm()
    noted = tensor(case.state, "limiter_norm")
    assert abs(torch.where(noted.isinf(), 0.0, noted) - residual.norm()) <= limit


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("shape", LARGE)
def test_only_the_residual_is_limited(form: Form, shape: tuple[int, int]) -> None:
    alpha = 0.5
    case = Case(SVD(8, "std", "eigh"), ScaledResidual(alpha, form), shape)
    taken_out, outer = (alpha, 1.0) if form == "released" else (1.0, alpha)
    residual = case.factors() * (case.grad.double() - taken_out * case.back(case.low))
    before = residual.norm().item() / 7
    tensor(case.state, "limiter_norm").fill_(before)
    expected = alpha * case.back(case.direction) + outer * residual * 1.01 / 7
    close(full(case.step(), shape), FACTOR * expected)
    assert tensor(case.state, "limiter_norm").item() == pytest.approx(1.01 * before, rel=1e-5)
    assert tensor(case.state, "log.limited") == 1.0


@pytest.mark.parametrize("make", [SVD, RandomNormal])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("limit", [None, 3.0])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_channel_scaling_is_the_scaled_gradient(
    make: Callable[[int], Projector], shape: tuple[int, int], limit: float | None, per: Any
) -> None:
    case = Case(make(3), ChannelScaling(per, 0.7), shape)
    phi = case.factors()
    if per == "tensor":
        phi = case.direction.double().norm() / (case.low.double().norm() + 1e-8)
    scaled = phi * case.grad.double()
    if limit is not None:
        tensor(case.state, "limiter_norm").copy_(scaled.norm() / limit)
        scaled *= 1.01 / limit
    step = case.step()
    close(full(step, shape), 0.7 * FACTOR * scaled)
    for row in range(0, shape[0], 150):
        close(part(step, shape, row, row + 1), 0.7 * FACTOR * scaled[row : row + 1], 1e-5)
    assert tensor(case.state, "limiter_norm").item() == pytest.approx(
        scaled.norm().item(), rel=1e-5
    )


@pytest.mark.parametrize("lift", [ScaledResidual(), ChannelScaling(), ChannelScaling("tensor")])
def test_bf16_gradients_are_scaled_in_float32(lift: Lift) -> None:
    """The factor of the limiter, 1.01, is only 2.6 units in the last place of bf16."""
    case = Case(SVD(4), lift, (64, 32), torch.bfloat16)
    case.step()
    assert tensor(case.state, "limiter_norm").dtype == torch.float32
    first = tensor(case.state, "limiter_norm").clone()
    case.grad *= 2
    case.low *= 2
    case.direction *= 4
    case.step()
    assert (tensor(case.state, "limiter_norm") / first).item() == pytest.approx(1.01, rel=1e-6)


def test_a_bf16_basis_is_near_enough_to_orthonormal_for_the_norm() -> None:
    """A gradient nearly all of which lies in the subspace, the worst case."""
    generator = torch.Generator().manual_seed(1)
    strong = torch.randn(300, 16, generator=generator) @ torch.randn(16, 100, generator=generator)
    case = Case(SVD(16, "std", "eigh"), ScaledResidual(1.0), (300, 100), torch.bfloat16)
    case.grad = (strong + 0.3 * torch.randn(300, 100, generator=generator)).bfloat16()
    case.projector.refresh(case.grad, case.state)
    case.low = case.projector.down(case.grad, case.state)
    case.step()
    rest = case.factors() * (case.grad.double() - case.back(case.low))
    whole = (case.factors() * case.grad.double()).norm()
    assert rest.norm() < 0.1 * whole
    assert abs(tensor(case.state, "limiter_norm") - rest.norm()) < 0.01 * whole


class Recorder(TorchDispatchMode):
    """Names of operations, and the largest tensor that one of them has made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        self.names.append(func.overloadpacket.__name__)
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.untyped_storage().nbytes() // 4)
        return result


PARTS: list[tuple[Projector, Lift, int]] = [
    (SVD(4), ScaledResidual(), 1),
    (SVD(4), ScaledResidual(form="paper"), 1),
    (RandomNormal(4), ChannelScaling(), 0),
    (RandomNormal(1), ChannelScaling("tensor"), 0),
]


@pytest.mark.parametrize(("projector", "lift", "products"), PARTS)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_back_at_most_and_nothing_of_full_size(
    projector: Projector, lift: Lift, products: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    case, group = Case(projector, lift, shape, dtype), 100
    weight = torch.zeros(shape)
    with Recorder() as recorder:
        step = case.step()
        for start in range(0, shape[0], group):
            step(weight[start : start + group], start, start + group, -1.0)
    multiplied = [name for name in recorder.names if name in ("mm", "addmm", "addmm_", "matmul")]
    assert len(multiplied) == products * shape[0] // group
    assert 0 < recorder.largest <= GROUP


@pytest.mark.parametrize(("projector", "lift", "products"), PARTS)
def test_zero_gradients_neither_move_nor_arm_the_limiter(
    projector: Projector, lift: Lift, products: int
) -> None:
    case = Case(projector, lift, (12, 8))
    real, low = case.grad.clone(), case.low.clone()
    case.grad.zero_()
    case.low.zero_()
    case.direction.zero_()
    assert not full(case.step(), (12, 8)).any()
    assert tensor(case.state, "limiter_norm").isinf()
    case.grad, case.low = real, low
    case.direction = torch.ones_like(low)
    case.step()
    assert tensor(case.state, "log.limited") == 0
    assert 0 < tensor(case.state, "limiter_norm") < 1e3


def test_alpha_and_its_square_are_both_shown() -> None:
    assert "alpha=11.3137" in repr(ChannelScaling("tensor", 128**0.5))
    assert "scale=128.0" in repr(ChannelScaling("tensor", 128**0.5))


@pytest.mark.parametrize("lift", [ScaledResidual(), ChannelScaling()])
def test_state_is_the_limiters_alone(lift: Lift) -> None:
    state: State = {"right": 1}
    lift.init(state, torch.empty(3, 3, device="meta"))
    assert set(state) == {"right", "limiter_norm", "log.limited"}
    assert lift.needs_gradient
    assert number(state, "right") == 1


def test_gamma_is_the_limiters() -> None:
    case = Case(SVD(2), ChannelScaling("channel", 1.0, NormGrowth(1.5)), (6, 4))
    tensor(case.state, "limiter_norm").fill_(1e-3)
    case.step()
    assert tensor(case.state, "limiter_norm").item() == pytest.approx(1.5e-3, rel=1e-4)
