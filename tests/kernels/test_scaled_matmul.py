"""Products in 8 bits with a scale per row, against the formula written slowly in float64."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.kernels import scaled_matmul
from lowmem.kernels.dispatch import forced, rehearsing
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.scaled_matmul import (
    EightBit,
    column_codes,
    input_gradient,
    linear,
    multiplies_fp8,
    row_codes,
)
from lowmem.kernels.slices import SLICE_ELEMENTS
from tests.kernels.calls import Calls

# tokens, outputs, inputs: one of each, odd sides, a side that sums more than a tile
SHAPES = [(1, 1, 1), (3, 70, 71), (65, 3, 300), (17, 48, 256)]
every_shape = pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
every_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def scaled_kernels(triton_kernels: torch.device, kind: EightBit) -> torch.device:
    """Inside, Triton kernels run, on a card that has the products."""
    if kind == "fp8" and triton_kernels.type == "cuda" and not multiplies_fp8():
        pytest.skip("the card has no products in fp8")
    return triton_kernels


class Allocated(TorchDispatchMode):
    """Inside, the bytes of every tensor that an `empty` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "empty" in func._schema.name:
            self.bytes.append(out.nbytes)
        elif isinstance(out, Tensor):
            assert any(each.alias_info for each in func._schema.returns), func
        return out


def draw(*shape: int, seed: int) -> Tensor:
    """Rows of very different sizes, and one of zeros where there are several."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made *= 10.0 ** torch.arange(shape[0]).remainder(5).neg().float().unsqueeze(1)
    if shape[0] > 2:
        made[2] = 0
    return made


def e4m3(value: float) -> float:
    """The nearest number of 4 bits of exponent and 3 of fraction, ties to even; no infinities."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)


def slow(matrix: Tensor, kind: EightBit) -> Tensor:
    """What the codes of the rows stand for, element by element, in float64."""
    largest, nearest = (127, round) if kind == "int8" else (448, e4m3)
    found = torch.zeros(matrix.shape, dtype=torch.float64)
    for i, row in enumerate(matrix.float()):
        scale = row.abs().max() / largest  # in float32, as the ratio is: ties are decided there
        for k, value in enumerate(row):
            if scale:
                found[i, k] = nearest(float(value / scale)) * float(scale)
    return found


def assert_product(found: Tensor, a: Tensor, b: Tensor, kind: EightBit) -> None:
    """found = a b' up to the float32 of its sums; of int8, of scaling alone."""
    roundings = 5 if kind == "int8" else 5 + a.shape[1]
    bound = roundings * 2.0**-24 * (a.abs() @ b.abs().T)
    assert ((found.double() - a @ b.T).abs() <= bound).all()


@every_kind
@every_shape
def test_products_are_those_of_the_formula(
    tokens: int, outputs: int, inputs: int, kind: EightBit
) -> None:
    x, weight, grad = (
        draw(*shape, seed=seed)
        for seed, shape in enumerate([(tokens, inputs), (outputs, inputs), (tokens, outputs)])
    )
    assert_product(linear(x, weight, kind), slow(x, kind), slow(weight, kind), kind)
    columns = slow(weight.T, kind)
    assert_product(input_gradient(grad, weight, kind), slow(grad, kind), columns, kind)


@every_kind
def test_the_input_gradient_is_that_of_the_product_of_dequantised_matrices(kind: EightBit) -> None:
    """By autograd, the rounding taken for the identity."""
    weight, grad = draw(48, 64, seed=1), draw(9, 48, seed=2)
    x = draw(9, 64, seed=3).double().requires_grad_()
    functional.linear(x, slow(weight.T, kind).T).backward(slow(grad, kind))
    assert x.grad is not None
    found = input_gradient(grad, weight, kind).double()
    assert (found - x.grad).norm() <= 1e-6 * x.grad.norm()  # sums of 48 in float32


@every_kind
def test_what_is_added_is_rounded_once_with_the_product(kind: EightBit) -> None:
    x, weight = draw(9, 64, seed=1).bfloat16(), draw(48, 64, seed=2).bfloat16()
    residual, bias = draw(9, 48, seed=3).bfloat16(), draw(48, 1, seed=4)[:, 0].bfloat16()
    plain = linear(x.float(), weight.float(), kind)
    for added in (residual, bias):
        found = linear(x, weight, kind, added)
        assert torch.equal(found, (plain + added.float()).bfloat16())
    grad, total = draw(9, 48, seed=5).bfloat16(), draw(9, 64, seed=6).bfloat16()
    plain = input_gradient(grad.float(), weight.float(), kind)
    wanted = (total.float() + plain).bfloat16()
    assert input_gradient(grad, weight, kind, total) is total
    assert torch.equal(total, wanted)


@every_kind
@pytest.mark.parametrize("group", [128, 48])  # whole groups, groups that run through rows
def test_a_weight_in_codes_gives_the_bits_of_its_values(group: int, kind: EightBit) -> None:
    coded = GroupedWeight.of(0.02 * torch.randn(70, 128), group)
    x, grad = draw(9, 128, seed=2), draw(9, 70, seed=3)
    assert torch.equal(linear(x, coded, kind), linear(x, coded.values(), kind))
    assert torch.equal(
        input_gradient(grad, coded, kind), input_gradient(grad, coded.values(), kind)
    )


def test_slices_change_no_bit_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = draw(70, 64, seed=1), draw(48, 64, seed=2), draw(70, 48, seed=3)
    whole = linear(x, weight, "int8"), input_gradient(grad, weight, "int8")
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", 256)
    assert len(list(scaled_matmul._slices(weight))) == 12
    assert torch.equal(linear(x, weight, "int8"), whole[0])
    assert torch.equal(input_gradient(grad, weight, "int8"), whole[1])


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_and_no_other(bad: float, kind: EightBit) -> None:
    x, weight, grad = torch.ones(9, 64), torch.ones(48, 64), torch.ones(9, 48)
    x[4, 7] = grad[3, 5] = bad
    for found, row in ((linear(x, weight, kind), 4), (input_gradient(grad, weight, kind), 3)):
        others = [i for i in range(9) if i != row]
        assert not found[row].isfinite().any()
        assert found[others].isfinite().all()
    weight[11, 13] = bad
    spoiled = ~linear(torch.ones(2, 64), weight, kind).isfinite()
    assert spoiled[:, 11].all()
    assert spoiled.sum() == 2
    spoiled = ~input_gradient(torch.ones(2, 48), weight, kind).isfinite()
    assert spoiled[:, 13].all()
    assert spoiled.sum() == 2


def test_a_card_without_triton_sums_int8_exactly() -> None:
    """In float32, 1,024 terms at a time: the largest there are, a few thousand of them."""
    a = torch.full((2, 2500), 127, dtype=torch.int8)
    a[1] = torch.arange(2500).remainder(255).sub(127)
    wanted = a.long() @ a.long().T
    with mock.patch.object(scaled_matmul, "device_type", return_value="cuda"):
        assert torch.equal(scaled_matmul._sums(a, a).long(), wanted)


@every_kind
@every_dtype
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [*SHAPES[:3], (130, 129, 20), (2, 3, 2100)]
)
def test_triton_makes_the_codes_of_the_reference_and_its_products(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, kind: EightBit,
    scaled_kernels: torch.device,
) -> None:  # fmt: skip
    x, weight, grad, residual, total = (
        draw(*shape, seed=seed).to(scaled_kernels, dtype)
        for seed, shape in enumerate(
            [(tokens, inputs), (outputs, inputs), *2 * [(tokens, outputs)], (tokens, inputs)]
        )
    )

    def all_there_is() -> list[Tensor]:
        products = [linear(x, weight, kind, each) for each in (None, residual, residual[0])]
        products += [input_gradient(grad, weight, kind, t) for t in (None, total.clone())]
        return [*products, *row_codes(x, kind), *column_codes(weight, kind)]

    with Calls() as calls:
        found = all_there_is()
    assert len(calls.kernels) == 5 * 3 + 2
    with forced("reference"):
        wanted = all_there_is()
    for mine, theirs in zip(found[5:], wanted[5:], strict=True):
        assert torch.equal(mine.float(), theirs.float())
    for mine, theirs in zip(found[:5], wanted[:5], strict=True):
        assert mine.dtype == dtype
        if kind == "int8":
            assert torch.equal(mine, theirs)
        else:  # sums of at most 2,100 in float32; in bfloat16 they may round to the neighbour
            bound = 2**-8 if dtype == torch.bfloat16 else 1e-6
            assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


@every_kind
def test_triton_rounds_ties_and_the_smallest_numbers_as_the_reference_does(
    kind: EightBit, scaled_kernels: torch.device
) -> None:
    """Scales of a power of two, so that ratios are exact: every half, and below e4m3's least."""
    top = 127.0 if kind == "int8" else 448.0
    row = torch.cat((torch.arange(-254, 255) / 2, 2.0 ** -torch.arange(30), torch.tensor([top])))
    row = torch.stack((row, row * 2.0**-20, torch.zeros_like(row))).to(scaled_kernels)
    codes, scales = row_codes(row, kind)
    turned, same = column_codes(row.T.contiguous(), kind)
    with forced("reference"):
        wanted, of_reference = row_codes(row, kind)
    for mine in (codes, turned):
        assert torch.equal(mine.float(), wanted.float())
    assert torch.equal(scales, of_reference)
    assert torch.equal(same, of_reference)


@every_kind
@pytest.mark.parametrize("group", [128, 48])
def test_triton_reads_a_weight_in_codes_slice_by_slice(
    group: int, kind: EightBit, scaled_kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_matmul, "SLICE_ELEMENTS", 1024)
    with forced("reference"):
        coded = GroupedWeight.of(draw(70, 128, seed=1).to(scaled_kernels), group)
    assert len(list(scaled_matmul._slices(coded))) > 5
    values = coded.values()
    for codes in (row_codes, column_codes):
        for mine, theirs in zip(codes(coded, kind), codes(values, kind), strict=True):
            assert torch.equal(mine.float(), theirs.float())


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy
def test_triton_lets_a_non_finite_number_reach_what_it_reaches_in_the_reference(
    bad: float, kind: EightBit, scaled_kernels: torch.device
) -> None:
    x, weight, grad = (
        draw(*shape, seed=shape[0]).to(scaled_kernels) for shape in ((9, 71), (48, 71), (8, 48))
    )
    x[4, 70] = weight[11, 13] = grad[7, 47] = bad  # at edges of tiles

    def both() -> list[Tensor]:
        return [linear(x, weight, kind), input_gradient(grad, weight, kind)]

    found = both()
    with forced("reference"):
        wanted = both()
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        assert not mine.isfinite().all()
        assert mine.isfinite().any()


@every_kind
def test_triton_takes_strided_tokens_and_none(kind: EightBit, scaled_kernels: torch.device) -> None:
    weight, wide = draw(48, 71, seed=1).to(scaled_kernels), draw(9, 142, seed=2).to(scaled_kernels)
    found = linear(wide[:, :71], weight, kind)
    assert torch.equal(found, linear(wide[:, :71].contiguous(), weight, kind))
    assert linear(wide[:0, :71], weight, kind).shape == (0, 48)


def test_a_plan_for_a_card_holds_codes_and_scales_and_no_sums() -> None:
    """Beside the result: a byte per element of both operands, four per row."""
    weight, x = (torch.empty(n, 64, device="meta", dtype=torch.bfloat16) for n in (48, 32))
    with rehearsing("cuda"), Allocated() as made:
        linear(x, weight, "int8")
    assert sum(made.bytes) == 2 * 32 * 48 + (32 + 48) * (64 + 4)
