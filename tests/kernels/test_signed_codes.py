"""Signed 8-bit codes: right on average, never clipped, honest about what is not finite."""

import pytest
import torch
from torch import Tensor

from lowmem.kernels.groupwise import uniform
from lowmem.kernels.signed_codes import dequantize, quantize

DRAWS = 4000


def drawn(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(2)) * 1e-4


def rounded(x: Tensor, seed: int) -> Tensor:
    return dequantize(*quantize(x.clone(), uniform(x.numel(), seed, 0, x.device)))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_a_value_becomes_one_of_its_two_neighbours(count: int) -> None:
    x = drawn(count)
    codes, scales = quantize(x.clone(), uniform(count, 3, 0, x.device))
    assert codes.dtype == torch.int8
    assert scales.numel() == -(-count // 256)
    for block in range(scales.numel()):
        mine = x[256 * block : 256 * (block + 1)].double()
        step = mine.abs().max() / 127
        torch.testing.assert_close(scales[block].double(), step, rtol=1e-6, atol=0)
        off = dequantize(codes, scales)[256 * block : 256 * (block + 1)].double() - mine
        assert off.abs().max() < step * (1 + 1e-5)  # a step, and float32's rounding of it


def test_codes_are_right_on_average() -> None:
    """A value a fraction f of the way to the next code: the mean of n draws scatters by
    sqrt(f (1 - f) / n) steps, so at most half a step over the root; six of them are never met."""
    x = drawn(512)
    mean = torch.stack([rounded(x, seed) for seed in range(DRAWS)]).double().mean(dim=0)
    step = x.view(-1, 256).abs().amax(dim=1).div(127).repeat_interleave(256).double()
    off = (mean - x.double()) / step
    assert off.abs().max() < 6 * 0.5 / DRAWS**0.5
    # Over all elements together a bias of a hundredth of a step would show.
    assert off.mean().abs() < 6 * 0.5 / (DRAWS * x.numel()) ** 0.5


def test_zeros_stay_zeros_and_the_largest_value_stays_itself() -> None:
    x = torch.zeros(512)
    x[300], x[301] = 5.0, -5.0
    for seed in range(50):
        torch.testing.assert_close(rounded(x, seed), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad: float) -> None:
    x = drawn(600)
    x[10] = bad
    found = rounded(x, 1)
    assert not found[:256].isfinite().any()
    assert found[256:].isfinite().all()
