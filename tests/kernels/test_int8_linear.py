"""Products with a weight in codes, against float64 and against each other."""

import pytest
import torch
from torch import Tensor

from lowmem.kernels import int8_linear
from lowmem.kernels.dispatch import forced, rehearsing
from lowmem.kernels.few_tokens import MOST_TOKENS
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.int8_linear import input_gradient, linear
from tests.kernels.calls import Calls

# tokens, outputs, inputs: one of each, no multiples of a tile, groups through rows, whole groups
SHAPES = [(1, 1, 1), (3, 70, 71), (65, 3, 300), (17, 129, 256), (130, 64, 128), (5, 70, 384)]
every_shape = pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(outputs: int, inputs: int, group: int = 128) -> GroupedWeight:
    with forced("reference"):
        return GroupedWeight.of(0.02 * draw(outputs, inputs, seed=1) + 0.005, group)


def to(weight: GroupedWeight, device: torch.device) -> GroupedWeight:
    stored = weight.codes.to(device), weight.scales.to(device), weight.zeros.to(device)
    return GroupedWeight(*stored, weight.group, weight.dtype)


def slow_values(weight: GroupedWeight) -> Tensor:
    """(code - zero) * scale in float64, element by element."""
    rows, width = weight.shape
    found = torch.empty(rows, width, dtype=torch.float64)
    for row in range(rows):
        for column in range(width):
            group = (row * width + column) // weight.group
            code, zero = int(weight.codes[row, column]), int(weight.zeros[group])
            found[row, column] = (code - zero) * float(weight.scales[group])
    return found


@every_shape
def test_the_reference_is_the_product_of_the_published_formula(
    tokens: int, outputs: int, inputs: int
) -> None:
    weight = codes(outputs, inputs)
    exact = slow_values(weight)
    x, grad = draw(tokens, inputs, seed=2), draw(tokens, outputs, seed=3)
    residual, total = draw(tokens, outputs, seed=4), draw(tokens, inputs, seed=5)
    wanted = [
        x.double() @ exact.T,
        residual.double() + x.double() @ exact.T,
        grad.double() @ exact,
        total.double() + grad.double() @ exact,
    ]
    found = [
        linear(x, weight),
        linear(x, weight, residual),
        input_gradient(grad, weight),
        input_gradient(grad, weight, total),
    ]
    for mine, theirs in zip(found, wanted, strict=True):
        # at most 384 products of about 0.02 in float32
        torch.testing.assert_close(mine.double(), theirs, atol=3e-6, rtol=1e-6)


@every_dtype
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "group"),
    [*((*shape, 128) for shape in SHAPES), (3, 70, 512, 256), (3, 70, 71, 48)],
)
def test_triton_differs_from_the_reference_by_the_order_of_its_sums(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, group: int,
    triton_kernels: torch.device,
) -> None:  # fmt: skip
    weight = to(codes(outputs, inputs, group), triton_kernels)
    x, grad, residual, total, bias = (
        draw(*shape, seed=seed).to(triton_kernels, dtype)
        for seed, shape in enumerate(
            [(tokens, inputs), (tokens, outputs), (tokens, outputs), (tokens, inputs), (outputs,)]
        )
    )
    with Calls() as calls:
        found = [linear(x, weight, added) for added in (None, residual, bias)]
        found += [input_gradient(grad, weight, each) for each in (None, total.clone())]
    assert len(calls.kernels) == 5
    with forced("reference"):
        wanted = [linear(x, weight, added) for added in (None, residual, bias)]
        wanted += [input_gradient(grad, weight, each) for each in (None, total.clone())]
    # float32 sums of at most 384; in bfloat16 they may round to the neighbour
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


def test_triton_multiplies_by_the_very_values_of_the_codes(triton_kernels: torch.device) -> None:
    """A product with a unit matrix sums nothing."""
    weight = to(codes(70, 129), triton_kernels)
    for dtype in (torch.float32, torch.bfloat16):
        values = weight.values(dtype)
        unit = torch.eye(129, device=triton_kernels, dtype=dtype)
        assert torch.equal(linear(unit, weight), values.t())
        unit = torch.eye(70, device=triton_kernels, dtype=dtype)
        assert torch.equal(input_gradient(unit, weight), values)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_triton_lets_a_non_finite_number_reach_what_it_reaches_in_the_reference(
    bad: float, triton_kernels: torch.device
) -> None:
    weight = to(codes(70, 71, 48), triton_kernels)
    weight.scales[3] = bad  # of elements 144 to 191: columns 2 to 49 of row 2
    x, grad = draw(9, 71, seed=2).to(triton_kernels), draw(9, 70, seed=3).to(triton_kernels)
    x[4, 70] = grad[8, 69] = bad  # at the edge of a tile
    found = [linear(x, weight), input_gradient(grad, weight)]
    with forced("reference"):
        wanted = [linear(x, weight), input_gradient(grad, weight)]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        assert not mine.isfinite().all()
        assert mine.isfinite().any()


def test_triton_takes_strided_tokens_and_none(triton_kernels: torch.device) -> None:
    weight = to(codes(70, 71), triton_kernels)
    wide = draw(9, 142, seed=2).to(triton_kernels)
    assert torch.equal(linear(wide[:, :71], weight), linear(wide[:, :71].contiguous(), weight))
    assert linear(wide[:0, :71], weight).shape == (0, 70)


def test_many_tokens_take_slices() -> None:
    weight = codes(8, 8)
    with rehearsing("cuda"):
        for tokens, kernels in ((MOST_TOKENS, 2), (MOST_TOKENS + 1, 0)):
            x = torch.empty(tokens, 8, device="meta")
            with Calls() as calls:
                linear(x, to(weight, x.device))
                input_gradient(x, to(weight, x.device))
            names = [operator._schema.name for operator, _ in calls.kernels]
            assert sum("int8" in name for name in names) == kernels
            assert ("lowmem::group_dequantize" in names) == (not kernels)


@every_dtype
def test_slices_of_any_size_give_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = codes(200, 640)
    x, residual = draw(5, 640, seed=2).to(dtype), draw(5, 200, seed=3).to(dtype)
    whole = linear(x, weight, residual)
    monkeypatch.setattr(int8_linear, "SLICE_ELEMENTS", 128)
    sliced = linear(x, weight, residual)
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-6  # another order of sums
    assert (sliced - whole).abs().max() <= bound * whole.abs().max()
