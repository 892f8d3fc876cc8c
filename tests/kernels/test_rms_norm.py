import pytest
import torch
from torch import Tensor

from lowmem.kernels import rms_norm as module
from lowmem.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward

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
