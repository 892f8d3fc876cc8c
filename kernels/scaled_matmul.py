"""Products with a weight in 8-bit numbers with a scale per row: x W' and its input gradient.

    out = linear(x, weight, "int8", added=residual)     # residual + x W'
    grad_x = input_gradient(grad, weight, "fp8")        # grad W

Both operands are quantised along the side that the product sums over, with a scale for each row of
the one and of the other:

    s_i = max_k |a_ik| / L,    A_ik = round(a_ik / s_i)           L = 127 (int8), 448 (fp8, e4m3)
    out_ij = s_i t_j sum_k A_ik B_jk

so the weight has a scale per output in x W' and one per input in grad W. Sums of int8 are exact
in int32 (up to 133,144 terms), so every device gives the same bits; those of fp8 are float32. A
row with a number that is not finite gives none that is.

Source: Wortsman et al. 2023, arXiv:2304.13013 (a scale per row); Micikevicius et al. 2022,
arXiv:2209.05433 (e4m3).
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel, device_type
from lowmem.kernels.grouped_weight import GroupedWeight, Weight, float_rows
from lowmem.kernels.slices import divided, pieces, row_slices, slice_elements

ROW_CODES = Kernel(
    "row_codes(Tensor rows, Tensor(a!) codes, Tensor(b!) scales) -> ()",
    triton="scaled_matmul_triton",
)
COLUMN_CODES = Kernel(
    "column_codes(Tensor rows, Tensor scales, Tensor(a!) codes, int start) -> ()",
    triton="scaled_matmul_triton",
)
PRODUCT = Kernel(
    "scaled_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? added, "
    "Tensor(a!) out, bool accumulate) -> ()",
    triton="scaled_matmul_triton",
)

EightBit = Literal["int8", "fp8"]
Codes = tuple[Tensor, Tensor]  # (n, k and zeros to a multiple of _WHOLE) int8 or e4m3, (n) float32

FP8_CAPABILITY = (8, 9)  # of the first cards with tensor cores for e4m3 (Ada)
SLICE_ELEMENTS = 2**24  # of a weight in codes made floats at a time: 32 MiB in bf16
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_WHOLE = 16  # codes that a card reads at once; rows of 5461 would be read one by one
_EXACT_TERMS = 1024  # of 127 * 127, whose float32 sum is exact


def linear(x: Tensor, weight: Weight, kind: EightBit, added: Tensor | None = None) -> Tensor:
    """added + x W': (n, inputs) -> (n, outputs), new. added: (outputs) or (n, outputs)."""
    out = x.new_empty(len(x), weight.shape[0])
    added = None if added is None else added.contiguous()
    _multiply(row_codes(x, kind), row_codes(weight, kind), added, out, accumulate=False)
    return out


def input_gradient(
    grad: Tensor, weight: Weight, kind: EightBit, total: Tensor | None = None
) -> Tensor:
    """grad W: (n, outputs) -> (n, inputs), new, or added to `total` in place."""
    out = grad.new_empty(len(grad), weight.shape[1]) if total is None else total
    codes = row_codes(grad, kind), column_codes(weight, kind)
    _multiply(*codes, None, out, accumulate=total is not None)
    return out


def multiplies_fp8() -> bool:
    """Has the current card tensor cores for it?"""
    return torch.cuda.get_device_capability() >= FP8_CAPABILITY


def row_codes(matrix: Weight, kind: EightBit) -> Codes:
    """Codes of a matrix (n, k), with a scale per row."""
    codes = _empty_codes(matrix.shape[0], matrix.shape[1], kind, matrix.device)
    scales = torch.empty(len(codes), dtype=torch.float32, device=matrix.device)
    quantize = ROW_CODES if ROW_CODES.runs_on(codes) else _row_codes
    _by_slices(matrix, lambda rows, at: quantize(rows.contiguous(), codes[at], scales[at]))
    return codes, scales


def column_codes(matrix: Weight, kind: EightBit) -> Codes:
    """Codes of the transpose of a matrix (k, n), with a scale per column of the matrix."""
    reduced, count = matrix.shape
    scales = torch.zeros(count, dtype=torch.float32, device=matrix.device)
    _by_slices(matrix, lambda rows, _: torch.maximum(scales, _largest(rows, 0), out=scales))
    codes = _empty_codes(count, reduced, kind, matrix.device)
    _to_scales(scales, codes.dtype)
    quantize = COLUMN_CODES if COLUMN_CODES.runs_on(codes) else _column_codes
    _by_slices(matrix, lambda rows, at: quantize(rows.contiguous(), scales, codes, at.start))
    return codes, scales


def _empty_codes(rows: int, width: int, kind: EightBit, device: torch.device) -> Tensor:
    codes = torch.empty(rows, width + -width % _WHOLE, dtype=_DTYPE[kind], device=device)
    if codes.shape[1] > width:
        codes[:, width:].zero_()
    return codes


def _multiply(
    first: Codes, second: Codes, added: Tensor | None, out: Tensor, *, accumulate: bool
) -> None:
    """out = added + a b' of what the codes stand for, or out += a b'."""
    run = PRODUCT if PRODUCT.runs_on(out) else _product
    run(*first, *second, added, out, accumulate)


def _by_slices(matrix: Weight, see: Callable[[Tensor, slice], object]) -> None:
    """see(float rows, which): all at once where a kernel reads them as they are."""
    for start, stop in _slices(matrix):
        see(float_rows(matrix, start, stop), slice(start, stop))


def _slices(matrix: Weight) -> Iterator[tuple[int, int]]:
    kernel = ROW_CODES.runs_on(matrix.codes if isinstance(matrix, GroupedWeight) else matrix)
    if isinstance(matrix, GroupedWeight):
        most = divided(SLICE_ELEMENTS) if kernel else None
        return row_slices(matrix.codes, matrix.group, most)
    return iter([(0, len(matrix))]) if kernel else row_slices(matrix, block=1)


def _row_codes(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    scales.copy_(_largest(rows, 1))
    _to_scales(scales, codes.dtype)
    codes[:, : rows.shape[1]].copy_(_rounded(rows, scales.unsqueeze(1), codes.dtype))


def _column_codes(rows: Tensor, scales: Tensor, codes: Tensor, start: int) -> None:
    codes[:, start : start + len(rows)].copy_(_rounded(rows, scales, codes.dtype).t())


def _largest(rows: Tensor, axis: int) -> Tensor:
    """Largest size along an axis, float32; nan where there is one."""
    # Twelve times as fast on a CPU as the infinity norm, and without a temporary of abs.
    return torch.maximum(rows.amax(axis), rows.amin(axis).neg_()).float()


def _to_scales(largest: Tensor, dtype: torch.dtype) -> None:
    # Not divided: a card multiplies by the reciprocal of a number of the host's, a CPU does not.
    largest.mul_(1 / LARGEST[dtype]).clamp_min_(SMALLEST_SCALE)


def _rounded(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """rows / scales in float32, whole numbers for int8; e4m3 is rounded when it is stored."""
    ratio = torch.div(rows, scales)
    return ratio.round_() if dtype == torch.int8 else ratio


def _product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, added: Tensor | None, out: Tensor,
    accumulate: bool,
) -> None:  # fmt: skip
    added = out if accumulate else added
    step = max(1, slice_elements(out) // max(1, len(b)))
    for start, stop in pieces(len(a), step, a.is_meta):
        sums = _sums(a[start:stop], b).mul(a_scales[start:stop].unsqueeze(1)).mul_(b_scales)
        if added is None:
            out[start:stop].copy_(sums)
        else:
            torch.add(sums, added[start:stop] if added.dim() == 2 else added, out=out[start:stop])
        del sums  # before the next are made


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a b' of codes: (n, k), (m, k) -> (n, m) int32 or float32."""
    if a.dtype != torch.int8:
        return a.float() @ b.float().t()
    if device_type(a) == "cpu":
        return torch._int_mm(a, b.t())
    # A card's takes more than 16 rows and multiples of 8 only.
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for start, stop in pieces(a.shape[1], _EXACT_TERMS, a.is_meta):
        total += (a[:, start:stop].float() @ b[:, start:stop].float().t()).to(torch.int32)
    return total
