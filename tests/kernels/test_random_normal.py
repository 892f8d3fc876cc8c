"""Normal numbers from (seed, index): the right distribution, the same wherever they are asked."""

import pytest
import torch

from lowmem.kernels.dispatch import forced
from lowmem.kernels.random_normal import normal

COUNT = 2**20


def test_moments_and_tails_are_those_of_a_normal() -> None:
    x = normal(COUNT, seed=1, device="cpu").double()
    error = 5 / COUNT**0.5  # five standard errors of a mean of variance-1 numbers
    assert abs(x.mean()) < error
    assert abs(x.square().mean() - 1) < error * 2**0.5
    assert abs(x.pow(3).mean()) < error * 15**0.5
    assert abs(x.pow(4).mean() - 3) < error * 96**0.5
    for edge, share in ((1.0, 0.31731), (2.0, 0.0455), (3.0, 0.0027)):
        found = (x.abs() > edge).double().mean()
        assert abs(found - share) < error * share**0.5


@pytest.mark.parametrize("offset", [2, 20, 1000])
def test_a_part_is_the_part_of_the_whole(offset: int) -> None:
    whole = normal(3001, seed=5, device="cpu")
    assert torch.equal(whole[offset:], normal(3001 - offset, 5, offset, device="cpu"))


def test_neighbours_and_other_seeds_are_uncorrelated() -> None:
    x, y = normal(COUNT, 7, device="cpu"), normal(COUNT, 8, device="cpu")
    error = 5 / COUNT**0.5
    assert abs((x * y).mean()) < error
    assert abs((x[1:] * x[:-1]).mean()) < error  # two numbers come from one hash
    assert not torch.equal(x.sort().values, y.sort().values)  # no permutation either


def test_meta_has_the_shape() -> None:
    assert normal(5, 1, device="meta").shape == (5,)


@pytest.mark.parametrize("offset", [0, 4000, 2**32 - 20])
@pytest.mark.parametrize("count", [0, 1, 1023, 1026, 16384 * 3 + 5])
def test_cpp_draws_the_numbers_of_the_reference(
    count: int, offset: int, native_kernels: torch.device
) -> None:
    found = normal(count, 11, offset, device=native_kernels)
    with forced("reference"):
        assert torch.equal(found, normal(count, 11, offset, device=native_kernels))


@pytest.mark.parametrize("offset", [0, 4000, 2**32 - 20])
@pytest.mark.parametrize("count", [0, 1, 1023, 1026])
def test_triton_draws_the_numbers_of_the_reference(
    count: int, offset: int, triton_kernels: torch.device
) -> None:
    found = normal(count, 11, offset, device=triton_kernels)
    with forced("reference"):
        assert torch.equal(found, normal(count, 11, offset, device=triton_kernels))
