"""The 8-bit quantiser against a slow float64 search and against bitsandbytes."""

import pytest
import torch

from lowmem.kernels.blockwise import (
    QUANTIZE,
    block_count,
    code_table,
    dequantize,
    dynamic_map,
    quantize,
)
from lowmem.kernels.dispatch import forced


def sample(count: int, signed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) * torch.logspace(-6, 2, count)
    return x if signed else x.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_codes_are_the_nearest(signed: bool, count: int) -> None:
    x = sample(count, signed)
    codes, absmax = quantize(x, signed)
    assert absmax.shape == (block_count(count),)
    values = dynamic_map(signed).double()
    for block in range(block_count(count)):
        piece = slice(256 * block, 256 * (block + 1))
        scaled = x[piece].double() / absmax[block].double()
        best = (scaled[:, None] - values).abs().amin(dim=1)
        chosen = (scaled - values[codes[piece].long()]).abs()
        assert (chosen <= best + 1e-7).all()  # float32 midpoints decide ties


@pytest.mark.parametrize("signed", [True, False])
def test_dequantised_values_stay_near(signed: bool) -> None:
    x = sample(4096, signed)
    codes, absmax = quantize(x, signed)
    error = (dequantize(codes, absmax, signed) - x).abs().view(-1, 256)
    # The coarsest cells of the map, next to 1, are 0.9/64 (signed) and 0.9/128 wide.
    cell = 0.9 / (64 if signed else 128)
    assert (error <= absmax[:, None] * cell * 0.51).all()


@pytest.mark.parametrize("signed", [True, False])
def test_map_equals_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is missing")
    theirs = functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_map(signed), theirs)


def test_bitsandbytes_reads_our_codes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is missing")
    x = sample(2560, signed=True)
    codes, absmax = quantize(x, signed=True)
    state = functional.QuantState(
        absmax=absmax, code=dynamic_map(True), blocksize=256, dtype=torch.float32, shape=x.shape
    )
    theirs = functional.dequantize_blockwise(codes, quant_state=state)
    assert torch.equal(dequantize(codes, absmax, signed=True), theirs)


def test_zero_blocks_stay_zero() -> None:
    for count in (256, 300):
        codes, absmax = quantize(torch.zeros(count), signed=True)
        assert torch.equal(dequantize(codes, absmax, signed=True), torch.zeros(count))


def test_floor_lifts_only_positive_underflow() -> None:
    x = torch.tensor([1.0, 1e-9, 0.0])
    plain, _ = quantize(x, signed=False)
    floored, _ = quantize(x, signed=False, floor_codes=True)
    assert plain.tolist() == [255, 0, 0]
    assert floored.tolist() == [255, 1, 0]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_change_exactly_at_the_midpoints(signed: bool, native_kernels: torch.device) -> None:
    """Every midpoint of the map and its two neighbours, against a search in float64."""
    values = dynamic_map(signed)
    middle = (values[:-1] + values[1:]) / 2
    around = [middle, *(middle.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))]
    ends = torch.tensor([0.0, -0.0, 1.0, 1e-9, 2**-23] + [-1.0, -1e-9] * signed)
    x = torch.cat([torch.cat([*around, ends]).clamp(min=-1.0 if signed else 0.0), torch.ones(1)])
    rows, block = torch.zeros(len(x), 256), torch.arange(len(x))
    place = 83 * block % 256  # everywhere in vectors
    rows[block, place], rows[block, place ^ 1] = x, 1.0  # a block for each, whose scale is 1
    wanted = (x.double()[:, None] > middle.double()).sum(dim=1)
    for choice in ("auto", "reference"):
        with forced(choice):
            codes, _ = quantize(rows, signed)
        assert torch.equal(codes[block, place].long(), wanted), choice
    # Code, bucket and limit fill no more than the low bits of an int32.
    assert code_table(signed).amin() >= 0


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_in_every_place_has_its_value(
    signed: bool, native_kernels: torch.device
) -> None:
    codes = (torch.arange(256) + torch.arange(256)[:, None]).to(torch.uint8)
    scales = torch.logspace(-40, 38, 256)  # from subnormal numbers to nearly the largest
    scales[:3] = torch.tensor([0.0, float("inf"), 1.0])
    found = dequantize(codes, scales, signed)
    wanted = dynamic_map(signed)[codes.long()] * scales[:, None]
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(bits_of(found[~found.isnan()]), bits_of(wanted[~wanted.isnan()]))


@pytest.mark.parametrize("count", [256 * 3000, 256 * 300 + 77])
@pytest.mark.parametrize("signed", [True, False])
def test_any_bits_have_the_codes_of_the_reference(
    signed: bool, count: int, native_kernels: torch.device
) -> None:
    """Of whatever float32: subnormal, infinite and none; beside others of any size, and alike."""
    generator = torch.Generator().manual_seed(count)
    blocks = block_count(count)
    bits = torch.randint(-(2**31), 2**31, (blocks, 256), generator=generator, dtype=torch.int64)
    exponents = torch.randint(0, 256, (blocks, 1), generator=generator)
    near = (exponents - torch.randint(0, 28, bits.shape, generator=generator)).clamp_(min=0)
    alike = torch.arange(blocks)[:, None] % 4 != 0  # most blocks hold what one scale can
    bits = torch.where(alike, bits & ~0x7F800000 | (near << 23), bits)
    x = bits.to(torch.int32).view(torch.float32).view(-1)[:count]
    x = x if signed else x.abs()
    for floor in (False, True):
        codes, scales = quantize(x, signed, floor)
        with forced("reference"):
            wanted, wanted_scales = quantize(x, signed, floor)
        assert torch.equal(scales.isnan(), wanted_scales.isnan())
        there = ~scales.isnan()
        assert 0.5 < there.float().mean() < 1.0
        assert torch.equal(bits_of(scales[there]), bits_of(wanted_scales[there]))
        same = codes.eq(wanted) | ~there.repeat_interleave(256)[:count]
        assert same.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [512, 300])
def test_a_number_that_is_none_shows_in_its_block_only(
    bad: float, count: int, triton_kernels: torch.device
) -> None:
    for choice in ("reference", "auto", "triton"):
        x = sample(count, True).to(triton_kernels)
        x[3] = bad
        with forced(choice):
            values = dequantize(*quantize(x, True), True)
        assert not values[3].isfinite()
        if bad != bad:
            assert values[:256].isnan().all()
        assert values[256:].isfinite().all()


def test_nothing_becomes_nothing(triton_kernels: torch.device) -> None:
    for choice in ("reference", "auto", "triton"):
        with forced(choice):
            codes, absmax = quantize(torch.empty(0, device=triton_kernels), True)
            assert (codes.numel(), absmax.numel()) == (0, 0)
            assert dequantize(codes, absmax, True).numel() == 0


@pytest.mark.parametrize("signed", [True, False])
def test_triton_takes_every_code_where_the_reference_does(
    signed: bool, triton_kernels: torch.device
) -> None:
    x = sample(5000, signed).to(triton_kernels)
    assert QUANTIZE.runs_on(x)
    for floor in (False, True):
        found = quantize(x, signed, floor)
        with forced("reference"):
            wanted = quantize(x, signed, floor)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("signed", [True, False])
def test_a_card_quantises_like_the_cpu(signed: bool) -> None:
    x = sample(5000, signed)
    codes, absmax = quantize(x, signed)
    on_card = quantize(x.cuda(), signed)
    assert torch.equal(on_card[0].cpu(), codes)
    assert torch.equal(on_card[1].cpu(), absmax)
