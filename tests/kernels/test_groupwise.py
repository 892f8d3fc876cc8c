"""The group quantiser against a slow float64 transcription of the published formulas."""

import math
import random

import pytest
import torch

from lowmem.kernels.dispatch import forced
from lowmem.kernels.groupwise import (
    Groups,
    dequantize,
    group_count,
    pack,
    quantize,
    quantize_into,
    uniform,
    unpack,
)

SIZES = [(1, 16), (15, 16), (16, 16), (17, 16), (1000, 256), (777, 100)]


def sample(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)) * 0.02


def slow(
    values: list[float], bits: int, noise: list[float] | None
) -> tuple[list[int], float, float]:
    """(codes, scale, zero) of one group, in float64, as published."""
    top = 2**bits - 1
    scale = max(max(values) - min(values), 1e-5) / top
    zero = min(max(-round(min(values) / scale), 0), top)
    codes = []
    for i, value in enumerate(values):
        ratio = value / scale
        rounded = (
            round(ratio)
            if noise is None
            else math.floor(ratio) + (noise[i] < ratio - math.floor(ratio))
        )
        codes.append(min(max(rounded + zero, 0), top))
    return codes, scale, zero


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("count", "group"), SIZES)
def test_groups_follow_the_published_formulas(
    count: int, group: int, bits: int, stochastic: bool
) -> None:
    x = sample(count)
    noise = uniform(count, 5, 0, x.device) if stochastic else None
    codes, scales, zeros = quantize(x, bits, group, noise, span_zero=False)
    assert len(scales) == len(zeros) == group_count(count, group)
    values = dequantize(codes, scales, zeros, group)
    for i in range(group_count(count, group)):
        piece = slice(i * group, (i + 1) * group)
        given = None if noise is None else noise[piece].tolist()
        expected, scale, zero = slow(x[piece].double().tolist(), bits, given)
        assert codes[piece].tolist() == expected
        assert zeros[i].item() == zero
        assert scales[i].item() == pytest.approx(scale, rel=1e-6)  # float32
        exact = [(code - zero) * scale for code in expected]
        assert values[piece].tolist() == pytest.approx(exact, rel=1e-6)


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 255.0])  # scale 1
    assert quantize(x, 8, 6).codes.tolist() == [0, 0, 2, 2, 4, 255]


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.1, 1.05], [-3.0, -2.9], [0.7] * 20])
def test_a_group_of_one_sign_survives(values: list[float]) -> None:
    """As published, its zero point cannot reach it and all its values become one."""
    x = torch.tensor(values)
    step = x.abs().max().item() / 255
    error = (dequantize(*quantize(x, 8, 32), 32) - x).abs().max().item()
    assert error <= 0.51 * step
    published = dequantize(*quantize(x, 8, 32, span_zero=False), 32)
    assert (published - x).abs().max().item() > 100 * step


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero(bits: int) -> None:
    x = torch.zeros(40)
    noise = torch.zeros(40)
    for how in (None, noise):
        assert torch.equal(dequantize(*quantize(x, bits, 16, how), 16), x)


@pytest.mark.parametrize(("count", "group"), SIZES)
def test_values_in_bf16_are_rounded_only_once(count: int, group: int) -> None:
    codes, scales, zeros = quantize(sample(count) + 0.01, 8, group)
    exact = dequantize(codes, scales, zeros, group)
    for form in (torch.float32, torch.uint8):
        rounded = dequantize(codes, scales, zeros.to(form), group, torch.bfloat16)
        assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_value_shows_in_its_group_only(bad: float) -> None:
    x = sample(64)
    x[3] = bad
    values = dequantize(*quantize(x, 8, 32), 32)
    assert not values[:32].isfinite().any()
    assert values[32:].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 7, 256])
def test_two_codes_share_a_byte(count: int) -> None:
    codes = torch.tensor([random.Random(i).randrange(16) for i in range(count)], dtype=torch.uint8)
    packed = pack(codes)
    assert packed.nbytes == (count + 1) // 2
    assert torch.equal(unpack(packed, count), codes)


def test_noise_is_uniform_and_belongs_to_the_element() -> None:
    device = torch.device("cpu")
    whole = uniform(2**16, 9, 0, device)
    assert torch.equal(whole[1000:1500], uniform(500, 9, 1000, device))
    assert whole.min() >= 0
    assert whole.max() < 1
    shares = torch.histc(whole, bins=16, min=0, max=1) / 2**12
    assert (shares - 1).abs().max() < 0.08  # five standard errors of 1/64
    assert not torch.equal(whole, uniform(2**16, 10, 0, device))


def into(x: torch.Tensor, group: int, zeros: torch.dtype) -> Groups:
    count = group_count(x.numel(), group)
    return Groups(
        torch.zeros(x.shape, dtype=torch.uint8, device=x.device),
        torch.zeros(count, device=x.device),
        torch.zeros(count, dtype=zeros, device=x.device),
    )


@pytest.mark.parametrize(("count", "group"), [*SIZES, (3, 1), (700, 3), (5003, 256)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("span_zero", [False, True])
def test_triton_writes_the_codes_of_the_reference(
    count: int,
    group: int,
    bits: int,
    stochastic: bool,
    span_zero: bool,
    triton_kernels: torch.device,
) -> None:
    x = sample(count).to(triton_kernels) + (0.1 if count % 2 else 0.0)
    at = (5, 2**31 - 50) if stochastic else None
    for zeros in (torch.uint8, torch.float32):
        found, wanted = into(x, group, zeros), into(x, group, zeros)
        quantize_into(found, x, bits, group, at, span_zero=span_zero)
        dtype = torch.bfloat16 if stochastic else torch.float32
        values = dequantize(*found, group, dtype)
        with forced("reference"):
            quantize_into(wanted, x, bits, group, at, span_zero=span_zero)
            assert torch.equal(values, dequantize(*wanted, group, dtype))
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_triton_shows_a_non_finite_value_in_its_group_only(
    bad: float, triton_kernels: torch.device
) -> None:
    x = sample(64).to(triton_kernels)
    x[3] = bad
    groups = into(x, 32, torch.uint8)
    quantize_into(groups, x, 8, 32, (1, 0))
    values = dequantize(*groups, 32)
    assert not values[3].isfinite()
    assert values[32:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_card_quantises_like_the_cpu(bits: int, stochastic: bool) -> None:
    x = sample(5000)
    noise = uniform(5000, 5, 0, x.device) if stochastic else None
    ours = quantize(x, bits, 256, noise)
    card = quantize(x.cuda(), bits, 256, None if noise is None else noise.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, card, strict=True))
    assert torch.equal(dequantize(*ours, 256), dequantize(*card, 256).cpu())
