"""Newton-Schulz against its scalar polynomial on the singular values."""

import pytest
import torch
from torch import Tensor

from lowmem.kernels.dispatch import forced, rehearsing
from lowmem.kernels.newton_schulz import LEAST_SIDE, newton_schulz, symmetric_product
from tests.kernels.calls import Calls

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


@every_shape
@pytest.mark.parametrize("turned", [False, True])
def test_a_symmetric_product_is_that_of_float64(shape: tuple[int, int], turned: bool) -> None:
    check_symmetric_product(matrix(shape), turned, atol=2e-5)  # 40 products in float32


# one tile, more than a tile, six tiles; odd sides
@pytest.mark.parametrize("shape", [(1, 9), (130, 33), (290, 5), (33, 130), (5, 290)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_mirrors_what_it_makes_below_the_diagonal(
    shape: tuple[int, int], turned: bool, dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    x = matrix(shape).to(triton_kernels, dtype)
    # bfloat16 keeps 8 bits of sums of up to 300 squares; float32 sums in another order
    atol = 2**-8 * 400 if dtype == torch.bfloat16 else 2e-4
    found = check_symmetric_product(x, turned, atol)
    assert torch.equal(found, found.T)


def check_symmetric_product(x: Tensor, turned: bool, atol: float) -> Tensor:
    """Both forms against float64; returns the second."""
    exact = x.double().T if turned else x.double()
    torch.testing.assert_close(
        symmetric_product(x, turned=turned).double(), exact @ exact.T, atol=atol, rtol=0
    )
    half = torch.ones(len(exact), len(exact), device=x.device, dtype=x.dtype).tril()
    added = half + half.T
    found = symmetric_product(x, added, turned=turned, alpha=0.5, beta=-2.0)
    wanted = 0.5 * exact @ exact.T - 2.0 * added.double()
    torch.testing.assert_close(found.double(), wanted, atol=atol, rtol=0)
    return found


@pytest.mark.parametrize("shape", [(140, 130), (9, 200)])
def test_triton_orthogonalises_like_the_reference(
    shape: tuple[int, int], triton_kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.kernels.newton_schulz.LEAST_SIDE", 1)
    x = matrix(shape).to(triton_kernels, torch.bfloat16)
    with Calls() as calls:
        found = newton_schulz(x.clone(), norm(x))
    assert len(calls.kernels) == 10
    with forced("reference"):
        exact = newton_schulz(x.float(), norm(x))
    # 8 bits of mantissa through 15 products
    torch.testing.assert_close(found.float(), exact, atol=3e-2, rtol=0)


@pytest.mark.parametrize(
    ("side", "dtype", "calls_expected"),
    [
        (LEAST_SIDE, torch.bfloat16, 10),
        (LEAST_SIDE - 1, torch.bfloat16, 0),
        (LEAST_SIDE, torch.float32, 0),
    ],
)
def test_large_matrices_in_bfloat16_take_the_kernel_on_a_card(
    side: int, dtype: torch.dtype, calls_expected: int
) -> None:
    x = torch.empty(side, 3 * side, device="meta", dtype=dtype)
    with rehearsing("cuda"), Calls() as calls:
        assert newton_schulz(x, norm(x)).shape == x.shape
    assert len(calls.kernels) == calls_expected
