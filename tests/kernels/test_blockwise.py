"""The 8-bit quantiser against a slow float64 search and against bitsandbytes."""

import pytest
import torch

from lowmem.kernels.blockwise import block_count, dequantize, dynamic_map, quantize


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("signed", [True, False])
def test_a_card_quantises_like_the_cpu(signed: bool) -> None:
    x = sample(5000, signed)
    codes, absmax = quantize(x, signed)
    on_card = quantize(x.cuda(), signed)
    assert torch.equal(on_card[0].cpu(), codes)
    assert torch.equal(on_card[1].cpu(), absmax)
