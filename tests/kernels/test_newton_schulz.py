"""Newton-Schulz against its scalar polynomial on the singular values."""

import pytest
import torch
from torch import Tensor

from lowmem.kernels.newton_schulz import newton_schulz

SHAPES = [(40, 12), (12, 40), (17, 17), (1, 9), (9, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32)


@every_shape
def test_every_singular_value_goes_through_the_polynomial(shape: tuple[int, int]) -> None:
    x = matrix(shape)
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / x.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ values.diag() @ right
    found = newton_schulz(x.clone(), norm(x))
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)  # float32, 15 products


@every_shape
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    x = matrix(shape)
    values = torch.linalg.svdvals(newton_schulz(x.clone(), norm(x)))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_bfloat16_stays_bfloat16_and_close() -> None:
    x = matrix((40, 12))
    exact = newton_schulz(x.clone(), norm(x))
    rounded = newton_schulz(x.bfloat16(), norm(x))
    assert rounded.dtype == torch.bfloat16
    # 8 bits of mantissa through 15 products
    torch.testing.assert_close(rounded.float(), exact, atol=3e-2, rtol=0)


def test_zero_stays_zero() -> None:
    assert not newton_schulz(torch.zeros(5, 3), torch.tensor(1e-7)).any()
