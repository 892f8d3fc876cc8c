"""Stochastic rounding: exact where it can be, unbiased elsewhere, the same everywhere."""

import pytest
import torch

from lowmem.kernels.dispatch import forced
from lowmem.kernels.rounding import hashed_bits, round_into, stochastic_round

CPU = torch.device("cpu")


def test_representable_numbers_are_kept() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, 1e-40, float("inf"), float("-inf")])
    exact = values.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), seed=3), exact)
    for bits in (0x7FC00000, 0x7FFFFFFF, -1):  # the NaN of a CPU, of a card, and a negative one
        for seed in range(20):
            nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
            assert stochastic_round(nan, seed).isnan().all()


@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 2**-9, 3.14159, -1e-3, 1e-20])
def test_rounding_is_unbiased(value: float) -> None:
    count = 200_000
    rounded = stochastic_round(torch.full((count,), value), seed=9).double()
    assert rounded.unique().numel() <= 2
    spacing = (rounded.max() - rounded.min()).item()
    # Four standard errors of a two-valued variable of that spacing.
    assert rounded.mean().item() == pytest.approx(value, abs=4 * spacing * 0.5 / count**0.5)


def test_noise_is_uniform_and_uncorrelated() -> None:
    bits = hashed_bits(2**18, seed=123, offset=0, device=CPU).bitwise_and(0xFFFF)
    counts = torch.bincount(bits >> 8, minlength=256).double()
    expected = 2**18 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6  # 255 degrees, deviation sqrt(510)
    x = bits.double() - bits.double().mean()
    for lag in (1, 2, 256):
        correlation = (x[:-lag] * x[lag:]).mean() / x.var()
        assert abs(correlation.item()) < 5 / 2**9


def test_noise_depends_on_seed_and_index_only() -> None:
    whole = hashed_bits(1000, seed=5, offset=0, device=CPU)
    assert torch.equal(whole[300:], hashed_bits(700, seed=5, offset=300, device=CPU))
    for other in (6, 5 + 2**40):
        assert (whole == hashed_bits(1000, seed=other, offset=0, device=CPU)).sum() < 5


@pytest.mark.parametrize("offset", [0, 12345, 2**31 - 10, 2**32 + 3])
@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 3000])
def test_triton_rounds_every_number_as_the_reference(
    count: int, offset: int, triton_kernels: torch.device
) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(triton_kernels)
    x[1:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40])[: max(0, count - 1)]
    check(x, offset)


def check(x: torch.Tensor, offset: int) -> None:
    """The kernel that is chosen outside against the reference."""
    found = torch.empty_like(x, dtype=torch.bfloat16)
    round_into(found, x.clone(), 2**60 + 7, offset)
    with forced("reference"):
        wanted = torch.empty_like(found)
        round_into(wanted, x.clone(), 2**60 + 7, offset)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 12345, 2**31 - 10, 2**32 + 3])
@pytest.mark.parametrize("count", [0, 1, 17, 16384 * 3 + 5])
def test_cpp_rounds_every_number_as_the_reference(
    count: int, offset: int, native_kernels: torch.device
) -> None:
    bits = torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(offset))
    check(bits.to(torch.int32).view(torch.float32), offset)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_rounds_like_the_cpu() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    on_card = stochastic_round(values.cuda(), seed=7, offset=12345)
    assert torch.equal(on_card.cpu(), stochastic_round(values.clone(), seed=7, offset=12345))
