"""8-bit Adam in one pass: against the formula in float64, and against read, compute, write."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem.kernels.adam8 import ADAM8, Moment8, add_adam8_direction
from lowmem.kernels.blockwise import dequantize, quantize
from lowmem.kernels.dispatch import forced
from lowmem.kernels.random_normal import normal

ALPHA, SCALE, BETAS, EPS = -0.01, 1.3, (0.9, 0.999), 1e-8


def case(count: int, seed: int = 0, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
    """(target, gradient, codes and scales of both moments)."""
    even = count + count % 2
    draw = [normal(even, seed + i, device="cpu")[:count].to(device) for i in range(4)]
    spread = torch.logspace(-5, 0, max(count, 1), device=device)[:count]
    with forced("reference"):
        first = quantize(1e-3 * draw[1] * spread, signed=True)
        second = quantize((1e-3 * draw[2] * spread).square(), signed=False, floor_codes=True)
    return (draw[0], 1e-3 * draw[3] * spread, *first, *second)


def moved(
    target: Tensor, gradient: Tensor, *moments: Tensor, floor: bool = True
) -> tuple[Tensor, ...]:
    add_adam8_direction(
        target,
        gradient,
        Moment8(*moments[:2]),
        Moment8(*moments[2:]),
        alpha=ALPHA,
        scale=SCALE,
        betas=BETAS,
        eps=EPS,
        floor_codes=floor,
    )
    return (target, *moments)


@pytest.mark.parametrize("choice", ["reference", "auto"])
@pytest.mark.parametrize("count", [1, 255, 257, 5000])
def test_it_follows_the_formula(count: int, choice: str) -> None:
    target, g, *moments = case(count)
    before, g64 = target.double(), g.double()
    m = BETAS[0] * dequantize(moments[0], moments[1], True).double() + (1 - BETAS[0]) * g64
    v = BETAS[1] * dequantize(moments[2], moments[3], False).double() + (1 - BETAS[1]) * g64**2
    with forced(choice):
        found, *kept = moved(target, g, *moments)
    step = SCALE * m / (v.sqrt() + EPS)
    torch.testing.assert_close(found.double(), before + ALPHA * step, atol=1e-6, rtol=1e-6)
    for (codes, absmax), exact, signed in ((kept[:2], m, True), (kept[2:], v, False)):
        again, scales = quantize(exact.float(), signed, floor_codes=True)
        torch.testing.assert_close(absmax, scales, rtol=1e-6, atol=0)
        # A float32 sum may lie on the other side of a midpoint.
        assert (codes.int() - again.int()).abs().max() <= 1
        assert codes.ne(again).float().mean() < 1e-2


def right_square_root() -> Any:
    """oneMKL's may miss the last bit."""
    return mock.patch.object(Tensor, "sqrt", lambda v: torch.sqrt(v.double()).float())


def check(count: int, seed: int, floor: bool, device: torch.device) -> None:
    """Moments and step are the bits of the reference."""
    found = moved(*case(count, seed, device), floor=floor)
    with forced("reference"), right_square_root():
        wanted = moved(*case(count, seed, device), floor=floor)
    assert all(map(torch.equal, found, wanted))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 3000), seed=st.integers(0, 99), floor=st.booleans())
def test_cpp_keeps_the_bits_of_the_reference(
    count: int, seed: int, floor: bool, native_kernels: torch.device
) -> None:
    check(count, seed, floor, native_kernels)


@pytest.mark.parametrize("threads", [1, 2])
def test_cpp_keeps_the_bits_of_strange_blocks(threads: int, native_kernels: torch.device) -> None:
    """Zeros, subnormal and huge numbers, and what is none; a number belongs to its block."""
    scales = [0.0, 1e-44, 1e-39, 1e-30, 1e-20, 1e-8, 1.0, 1e15, 1e19, 3e38, 1.0, 1.0, 1.0]
    spread = torch.tensor(scales).repeat_interleave(256)[: 256 * len(scales) - 100]

    def strange() -> tuple[Tensor, ...]:
        target, gradient, *moments = case(len(spread), 3)
        gradient.mul_(1e3).clamp_(-1, 1).mul_(spread)
        gradient[[10 * 256 + 7, 11 * 256 + 8]] = torch.tensor([float("nan"), -float("inf")])
        moments[1][:5] = torch.tensor([0.0, 1e-44, 0.0, 1e-30, 1e38])
        moments[3][:5] = torch.tensor([0.0, 1e-44, 1e-38, 0.0, 1e38])
        moments[1][5] = float("inf")
        return target, gradient, *moments

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = moved(*strange())
    finally:
        torch.set_num_threads(before)
    with forced("reference"), right_square_root():
        wanted = moved(*strange())
    for codes, absmax in ((1, 2), (3, 4)):
        there = ~wanted[absmax].isnan()
        assert there.sum() > 5
        assert torch.equal(found[absmax].isnan(), wanted[absmax].isnan())
        assert torch.equal(found[absmax][there], wanted[absmax][there])
        of_those = there.repeat_interleave(256)[: len(spread)]
        assert torch.equal(found[codes][of_those], wanted[codes][of_those])
    torch.testing.assert_close(found[0], wanted[0], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 255, 257, 5003])
@pytest.mark.parametrize("floor", [True, False])
def test_triton_keeps_the_bits_of_the_reference(
    count: int, floor: bool, triton_kernels: torch.device
) -> None:
    check(count, 0, floor, triton_kernels)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_none_spoils_its_block_only(
    bad: float, triton_kernels: torch.device
) -> None:
    for choice in ("reference", "auto", "triton"):
        target, g, *moments = case(600, 0, triton_kernels)
        g[3] = bad
        with forced(choice):
            found, *kept = moved(target, g, *moments)
        assert found[3].isnan()
        assert found[256:].isfinite().all()
        assert not dequantize(kept[0], kept[1], True)[3].isfinite()
        assert all(scales[1:].isfinite().all() for scales in kept[1::2])


def test_an_underflowing_second_moment_does_not_become_zero(triton_kernels: torch.device) -> None:
    for choice in ("reference", "auto", "triton"):
        target, g, *moments = case(256, 0, triton_kernels)
        g.fill_(1e-9)
        g[0] = 1.0
        with forced(choice):
            _, *kept = moved(target, g, *moments)
            assert (kept[2] > 0).all()


def test_shapes_that_differ_are_noticed() -> None:
    """A kernel would write beyond the end."""
    target, gradient, *moments = case(512)
    with pytest.raises(AssertionError):
        moved(target, gradient[:256], *moments)
    assert ADAM8.native
