"""Blockwise 8-bit quantisation: a byte per element, an index into a fixed map of 256 values.

    x (n elements) -> codes (n, uint8), absmax (ceil(n / 256), float32);   x ~ map[codes] * absmax

Blocks are 256 consecutive elements in memory order, the last one may be shorter.

Source: Dettmers et al., arXiv:2110.02861, section 2; the last bit of maps and scales follows
bitsandbytes 0.50, so codes are equal to its exact nearest rule.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
_TINY = 1e-38  # divisor of an all-zero block


def block_count(elements: int) -> int:
    """Number of blocks, and of scales, of that many elements."""
    return -(-elements // BLOCK)


@cache
def dynamic_map(signed: bool, device: str = "cpu") -> Tensor:
    """The 256 values of the map, ascending, float32: constant relative precision over 7 decades."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values.to(device)


@cache
def _midpoints(signed: bool, device: str) -> Tensor:
    values = dynamic_map(signed, "cpu")
    return ((values[:-1] + values[1:]) / 2).to(device)


def lookup_tables(device: str) -> list[Tensor]:
    """The constants that this module keeps on a device once it has been used there."""
    return [make(signed, device) for make in (dynamic_map, _midpoints) for signed in (True, False)]


def quantize(x: Tensor, signed: bool, floor_codes: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of the nearest map values and the scale of every block.

    x: any shape, float32, contiguous. Returns codes of x's shape (uint8) and absmax (blocks,).
    Ties go to the lower code. floor_codes: a positive value never gets code 0, that is zero
    (unsigned map only): a second moment that underflows would make the next step huge.
    """
    flat = x.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    blocks, tail = flat[:whole].view(-1, BLOCK), flat[whole:]
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.empty_like(flat)
    torch.mul(
        blocks,
        absmax.clamp(min=_TINY).reciprocal().unsqueeze(1),
        out=scaled[:whole].view(-1, BLOCK),
    )
    if tail.numel():
        # bitsandbytes divides in the short last block, and stores 1e-38 where it is all zero.
        last = tail.abs().amax().clamp(min=_TINY)
        torch.div(tail, last, out=scaled[whole:])
        absmax = torch.cat([absmax, last.unsqueeze(0)])
    scaled.clamp_(-1.0, 1.0)
    wide = torch.bucketize(scaled, _midpoints(signed, str(x.device)), out_int32=True)
    del scaled
    codes = wide.to(torch.uint8)
    del wide
    if floor_codes and not signed:
        torch.maximum(codes, (flat > 0).to(torch.uint8), out=codes)
    return codes.view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """map[codes] * absmax, float32, of the shape of codes.

    The first code must begin a block.
    """
    values = dynamic_map(signed, str(codes.device)).index_select(0, codes.reshape(-1).int())
    whole = values.numel() // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK].unsqueeze(1))
    if whole < values.numel():
        values[whole:].mul_(absmax[-1])
    return values.view(codes.shape)
