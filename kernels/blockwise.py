"""Blockwise 8-bit quantisation: a byte per element, an index into a fixed map of 256 values.

    x (n elements) -> codes (n, uint8), absmax (ceil(n / 256), float32);   x ~ map[codes] * absmax

Blocks are 256 consecutive elements in memory order, the last one may be shorter.

Source: Dettmers et al., arXiv:2110.02861, section 2; the last bit of maps and scales follows
bitsandbytes 0.50, so codes are equal to its exact nearest rule.
"""

from functools import cache

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.slices import BLOCK, pieces, slice_elements

_TINY = 1e-38  # divisor of an all-zero block

# The bits of a float32 above these are a bucket of the table in which at most one code ends.
_SHIFT = 16
_FIRST, _ONE = 0x34000000, 0x3F800000  # bits of 2^-23, below which no code ends, and of 1.0
_BUCKETS = ((_ONE - _FIRST) >> _SHIFT) + 1  # of either sign
_BELOW = 2**_SHIFT - 1

QUANTIZE = Kernel(
    "blockwise_quantize(Tensor x, Tensor values, Tensor table, Tensor(a!) codes, "
    "Tensor(b!) absmax, bool lift) -> ()",
    triton="blockwise_triton",
    native=True,
)
DEQUANTIZE = Kernel(
    "blockwise_dequantize(Tensor codes, Tensor absmax, Tensor values, Tensor(a!) out) -> ()",
    triton="blockwise_triton",
    native=True,
)


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
def code_table(signed: bool, device: str = "cpu") -> Tensor:
    """What the nearest code is, by bucket of the magnitude's bits: positive ones, then negative.

    int32: (code << 16) + limit. A positive number has that code, or the next one if its low 16 bits
    are above the limit; a negative one that code, or the one before it. Exact: every midpoint of
    two values of the map is the limit of a bucket.
    """
    values = dynamic_map(signed)
    midpoints = (values[:-1] + values[1:]) / 2
    first = torch.arange(_BUCKETS, dtype=torch.int32) << _SHIFT
    first = torch.where(first == 0, first, first + _FIRST)  # the first bucket begins at zero
    last = torch.arange(_BUCKETS, dtype=torch.int32) * 2**_SHIFT + _FIRST + _BELOW
    table = []
    for sign in (1.0, -1.0):
        begins, ends = (
            torch.bucketize(bits.view(torch.float32) * sign, midpoints, out_int32=True)
            for bits in (first, last)
        )
        nearest = midpoints[torch.minimum(begins, ends).long().clamp(max=254)]
        limit = nearest.abs().view(torch.int32) & _BELOW
        # Ties go to the lower code: of a negative number, to that of the larger magnitude.
        limit = torch.where(begins == ends, _BELOW, limit if sign > 0 else limit - 1)
        table.append((begins << _SHIFT) + limit)
    return torch.cat(table).to(device)


def lookup_tables(device: str) -> list[Tensor]:
    """The constants that this module keeps on a device once it has been used there."""
    return [make(signed, device) for make in (dynamic_map, code_table) for signed in (True, False)]


def quantize(x: Tensor, signed: bool, floor_codes: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of the nearest map values and the scale of every block.

    x: any shape, float32, contiguous. Returns codes of x's shape (uint8) and absmax (blocks,).
    Ties go to the lower code. floor_codes: a positive value never gets code 0, that is zero
    (unsigned map only): a second moment that underflows would make the next step huge. The scale of
    a block with NaN is NaN, and its codes mean nothing.
    """
    lift = floor_codes and not signed
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    values, table = (make(signed, str(x.device)) for make in (dynamic_map, code_table))
    if QUANTIZE.runs_on(x):
        absmax = torch.empty(block_count(x.numel()), dtype=torch.float32, device=x.device)
        QUANTIZE(x, values, table, codes, absmax, lift)
        return codes, absmax
    flat, found = x.view(-1), codes.view(-1)
    scaled, absmax = _scaled(flat)
    for start, stop in pieces(flat.numel(), slice_elements(x) // 4, x.is_meta):
        _encode(scaled[start:stop], table, found[start:stop])
    if lift:
        torch.maximum(found, (flat > 0).to(torch.uint8), out=found)
    return codes, absmax


def _scaled(flat: Tensor) -> tuple[Tensor, Tensor]:
    """(x / absmax, absmax), the former about within [-1, 1]."""
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
    return scaled, absmax


def _encode(scaled: Tensor, table: Tensor, out: Tensor) -> None:
    """out <- nearest codes of numbers within [-1, 1], which are spoilt."""
    bits = scaled.view(torch.int32)
    bucket = bits.bitwise_and(0x7FFFFFFF).clamp_(_FIRST, _ONE).sub_(_FIRST)
    bucket.bitwise_right_shift_(_SHIFT).add_((bits < 0).to(torch.int16), alpha=_BUCKETS)
    found = table.index_select(0, bucket)
    del bucket
    # A number beyond 1 by a rounding is 1.
    sign = bits.bitwise_right_shift(31).bitwise_or_(1).to(torch.int8)
    low = bits.bitwise_and_(0x7FFFFFFF).clamp_(max=_ONE).bitwise_and_(_BELOW)
    beyond = low > (found & _BELOW)
    found.bitwise_right_shift_(_SHIFT).addcmul_(sign, beyond)
    out.copy_(found)


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """map[codes] * absmax, float32, of the shape of codes.

    The first code must begin a block.
    """
    table = dynamic_map(signed, str(codes.device))
    if DEQUANTIZE.runs_on(codes):
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        DEQUANTIZE(codes.contiguous(), absmax, table, out)
        return out
    values = table.index_select(0, codes.reshape(-1).int())
    whole = values.numel() // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK].unsqueeze(1))
    if whole < values.numel():
        values[whole:].mul_(absmax[-1])
    return values.view(codes.shape)
