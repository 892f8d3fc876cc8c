import pytest
import torch
from torch import Tensor

from lowmem.kernels import rms_norm as module
from lowmem.kernels.dispatch import forced
from lowmem.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward
from tests.kernels.calls import Calls

SHAPES = [(1, 1), (1, 33), (7, 5), (64, 16)]


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_the_formula_in_float64(shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape) * 3, torch.randn(shape[1])
    y, rstd = rms_norm(x, weight, 1e-6)
    # a handful of float32 roundings
    torch.testing.assert_close(y.double(), formula(x, weight, 1e-6), rtol=1e-6, atol=1e-6)
    assert rstd.shape == (shape[0], 1)


def test_a_row_of_zeros_stays_zero() -> None:
    y, rstd = rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6)
    assert y.eq(0).all()
    torch.testing.assert_close(rstd, torch.full((2, 1), 1e3))


def test_bf16_keeps_float32_statistics_and_rounds_before_the_weight() -> None:
    x, weight = torch.randn(16, 64).bfloat16(), torch.randn(64).bfloat16()
    y, rstd = rms_norm(x, weight, 1e-6)
    normal = formula(x, torch.ones(64), 1e-6).bfloat16()
    assert y.dtype == torch.bfloat16
    assert rstd.dtype == torch.float32
    # one more bf16 rounding where the float64 value lies on a boundary
    torch.testing.assert_close(y, normal * weight, rtol=2**-7, atol=0)


def test_the_norm_made_again_is_bit_identical() -> None:
    x, weight = torch.randn(9, 12).bfloat16(), torch.randn(12).bfloat16()
    y, rstd = rms_norm(x, weight, 1e-5)
    assert torch.equal(rms_norm_again(x, weight, rstd), y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slice_elements", [1, 40, 2**21])
def test_gradients_equal_autograd_of_the_formula(
    shape: tuple[int, int], slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_ELEMENTS", slice_elements)
    x, weight, grad = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    formula(*leaves, 1e-6).backward(grad.double())
    grad_weight = rms_norm_backward(grad, x, weight, rms_norm(x, weight, 1e-6)[1])
    # float32 sums of up to 64 products; the lone element cancels to nearly nothing
    torch.testing.assert_close(grad.double(), leaves[0].grad, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(grad_weight.double(), leaves[1].grad, rtol=1e-5, atol=1e-5)


HURTING = [(0, 8), (1, 1), (17, 96), (300, 33), (2, 8192)]
BOTH = [torch.float32, torch.bfloat16]
OFF = {torch.float32: 1e-6, torch.bfloat16: 2**-6}
"""Relative: a few float32 roundings; a tie met otherwise at either of two roundings to bfloat16."""


def hurt(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Over six decades, with a row of zeros and subnormal numbers."""
    x = (torch.randn(shape) * 10.0 ** torch.randint(-3, 3, shape)).to(dtype)
    x[1:2] = 0
    x[2:3, ::2] = 1e-39
    return x


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", HURTING)
def test_triton_normalises_as_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    x, weight = (hurt(each, dtype).to(triton_kernels) for each in (shape, (1, shape[1])))
    with Calls() as calls:
        y, rstd = rms_norm(x, weight[0], 1e-6)
        again = rms_norm_again(x, weight[0], rstd)
    assert [operator.__name__ for operator, _ in calls.kernels] == [
        "rms_norm.default",
        "rms_norm_again.default",
    ]
    with forced("reference"):
        wanted = rms_norm(x, weight[0], 1e-6)[0]
        from_ours = rms_norm_again(x, weight[0], rstd)
    exact = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(y, wanted, rtol=OFF[dtype], atol=0)
    assert torch.equal(again, y)
    assert torch.equal(from_ours, y)  # element by element nothing may differ


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", HURTING)
def test_triton_makes_the_gradients_of_the_formula_the_same_every_time(
    shape: tuple[int, int], dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    x, grad = (torch.randn(shape).to(triton_kernels, dtype) for _ in range(2))
    weight = torch.randn(shape[1]).to(triton_kernels, dtype)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    formula(*leaves, 1e-6).backward(grad.double())
    rstd = rms_norm(x, weight, 1e-6)[1]
    made, again = grad.clone(), grad.clone()
    grad_weight = rms_norm_backward(made, x, weight, rstd)
    assert torch.equal(rms_norm_backward(again, x, weight, rstd), grad_weight)
    assert torch.equal(made, again)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(made.double(), leaves[0].grad, rtol=rounding, atol=2e-5)
    torch.testing.assert_close(
        grad_weight.double(), leaves[1].grad, rtol=rounding, atol=1e-5 * max(1, shape[0])
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_triton_leaves_what_is_not_finite_in_its_row(
    bad: float, triton_kernels: torch.device
) -> None:
    x, weight = torch.randn(5, 40).to(triton_kernels), torch.ones(40, device=triton_kernels)
    x[2, 7] = bad
    grad = torch.ones_like(x)
    y, rstd = rms_norm(x, weight, 1e-6)
    grad_weight = rms_norm_backward(grad, x, weight, rstd)
    with forced("reference"):
        wanted, inverse = rms_norm(x, weight, 1e-6)
        expected = torch.ones_like(x)
        of_weight = rms_norm_backward(expected, x, weight, inverse)
    for ours, theirs in ((y, wanted), (grad, expected), (grad_weight, of_weight)):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert ours is grad_weight or ours.isfinite().any()


def test_rows_wider_than_a_program_run_in_the_reference(
    triton_kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WIDEST", 15)
    x, weight = torch.randn(3, 16).to(triton_kernels), torch.ones(16, device=triton_kernels)
    with Calls() as calls:
        y, rstd = rms_norm(x, weight, 1e-6)
        rms_norm_backward(y, x, weight, rstd)
    assert not calls.kernels
