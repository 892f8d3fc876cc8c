"""A case of every kernel: what `lowmem doctor --kernels` and `lowmem bench kernels` run.

for example in EXAMPLES:
    changed = example.run(*example.make(2**20, torch.device("cuda")))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem.kernels import (
    blockwise,
    drawn_projection,
    groupwise,
    int8_linear,
    rms_norm,
    rope,
    scaled_matmul,
    scaled_write,
    swiglu,
    unproject_write,
)
from lowmem.kernels.adam8 import ADAM8, Moment8, add_adam8_direction
from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import Kernel, forced
from lowmem.kernels.drawn_projection import channel_norms, project_on_line
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.limited_scales import SCALES, limited_scales
from lowmem.kernels.newton_schulz import SYMMETRIC, symmetric_product
from lowmem.kernels.random_normal import NORMAL, normal
from lowmem.kernels.rounding import ROUND, hashed_bits, round_into
from lowmem.kernels.scaled_matmul import EightBit
from lowmem.kernels.scaled_write import Scaled
from lowmem.kernels.unproject_write import Product

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """make(elements, device): arguments. run(*arguments): all that is new or has changed.

    bytes: read and written per element, at least. Integers and scales have to be those of the
    reference; tolerance: of other floats, relative to the largest of the reference; neighbours: by
    how many a bfloat16 may lie off besides, for what is rounded twice meets a tie otherwise.
    """

    kernel: Kernel
    make: Callable[[int, torch.device], Tensors]
    run: Callable[..., Tensors]
    bytes: float
    tolerance: float = 0.0
    neighbours: int = 0


def _numbers(elements: int, seed: int, device: torch.device) -> Tensor:
    """Normal numbers over four decades, the same on every device."""
    even = elements + elements % 2
    spread = torch.arange(elements, device=device).remainder(5).neg().float()
    return normal(even, seed, device=device)[:elements] * 10.0**spread


def _moments(elements: int, device: torch.device) -> Tensors:
    gradient, m = (_numbers(elements, seed, device) for seed in (1, 2))
    with forced("reference"):
        first = blockwise.quantize(m, signed=True)
        second = blockwise.quantize(m.square(), signed=False, floor_codes=True)
    return (torch.zeros_like(gradient), gradient, *first, *second)


def _adam8(target: Tensor, gradient: Tensor, *moments: Tensor) -> Tensors:
    add_adam8_direction(
        target,
        gradient,
        Moment8(*moments[:2]),
        Moment8(*moments[2:]),
        alpha=-0.1,
        scale=1.3,
        betas=(0.9, 0.999),
        eps=1e-8,
        floor_codes=True,
    )
    return (target, *moments)


def _codes(elements: int, device: torch.device) -> Tensors:
    with forced("reference"):
        return blockwise.quantize(_numbers(elements, 1, device), signed=True)


def _rounded(x: Tensor) -> Tensors:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_into(out, x.clone(), seed=7, offset=2**31 - 100)  # where the index wraps
    return (out,)


def _groups(x: Tensor) -> Tensors:
    count = groupwise.group_count(x.numel(), _GROUP)
    into = groupwise.Groups(
        torch.empty(x.shape, dtype=torch.uint8, device=x.device),
        torch.empty(count, device=x.device),
        torch.empty(count, dtype=torch.uint8, device=x.device),
    )
    groupwise.quantize_into(into, x, 8, _GROUP, at=(7, 2**31 - 100))
    return into


def _grouped(elements: int, device: torch.device) -> Tensors:
    with forced("reference"):
        return _groups(_numbers(elements, 1, device))


def _ungrouped(*groups: Tensor) -> Tensors:
    codes, scales, zeros = groups
    return (groupwise.dequantize(codes, scales, zeros, _GROUP, torch.bfloat16),)


def _matrix(elements: int, seed: int, device: torch.device) -> Tensor:
    """About so many elements, of two decades, as a matrix that is not square."""
    width = max(1, min(4096, math.isqrt(4 * elements)))
    rows = max(1, elements // width)
    return _numbers(rows * width, seed, device).view(rows, width)


def _projections(full: Tensor) -> Tensors:
    return (*project_on_line(full, 5, right=True), *project_on_line(full, 5, right=False))


def _scaled_weight(elements: int, device: torch.device) -> Tensors:
    full, weight = (_matrix(elements, seed, device).bfloat16() for seed in (1, 2))
    return full, full.float().norm(dim=0, keepdim=True), weight


def _scaled_codes(elements: int, device: torch.device) -> Tensors:
    full, factors, weight = _scaled_weight(elements, device)
    with forced("reference"):
        return full, factors, *_groups(weight.float().contiguous())


def _scaled_step(full: Tensor, factors: Tensor, *stored: Tensor) -> Tensors:
    weight: Weight = stored[0]
    if len(stored) > 1:
        weight = GroupedWeight(stored[0], stored[1], stored[2], _GROUP)
    _write(weight, Scaled(full, factors, 0.5))
    return stored


def _norms_of_channels(elements: int, device: torch.device) -> Tensors:
    over, under, norms = (_numbers(elements, seed, device).abs() for seed in (1, 2, 3))
    return over, under, norms, norms.norm() / 3, torch.zeros((), device=device)


def _limited(over: Tensor, under: Tensor, norms: Tensor, last: Tensor, limited: Tensor) -> Tensors:
    scales = limited_scales(over.clone(), under.clone(), norms.clone(), last, limited, 1.01)
    return scales, last, limited


_GROUP = 128
_RANK, _WIDEST = 64, 4096


def _product(rows: int, columns: int, device: torch.device) -> Tensors:
    """Factors of -1, 0 and 1: in whatever order their products are added, the sum is exact."""
    drawn = hashed_bits((rows + columns) * _RANK, 5, 0, device).remainder(3).sub(1).bfloat16()
    first, second = drawn[: rows * _RANK], drawn[rows * _RANK :]
    return first.view(rows, _RANK), second.view(_RANK, columns)


def _unprojected(elements: int, device: torch.device) -> Tensors:
    columns = min(elements, _WIDEST)
    rows = elements // columns
    weight, rest = (
        _numbers(rows * columns, seed, device).view(rows, columns).bfloat16() for seed in (1, 2)
    )
    factors = hashed_bits(columns, 3, 0, device).remainder(4).neg().float().exp2()
    return (weight, *_product(rows, columns, device), rest, factors.view(1, columns))


def _written(weight: Tensor, first: Tensor, second: Tensor, *rest: Tensor) -> Tensors:
    full, factors = rest
    _write(weight, Product(first, second, Scaled(full, factors, 0.5)))
    return (weight,)


def _unprojected_codes(elements: int, device: torch.device) -> Tensors:
    columns = min(-(-elements // _GROUP) * _GROUP, _WIDEST)
    rows = -(-elements // columns)
    with forced("reference"):
        groups = _groups(_numbers(rows * columns, 1, device).view(rows, columns))
    return (*groups, *_product(rows, columns, device))


def _written_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor, first: Tensor, second: Tensor
) -> Tensors:
    _write(GroupedWeight(codes, scales, zeros, _GROUP), Product(first, second))
    return codes, scales, zeros


_DESCENT = Descent(-0.125, 2.0**-10, True, seed=7, offset=2**31 - 100)  # where the index wraps


def _write(weight: Weight, step: Product | Scaled) -> None:
    """By the kernel where it runs, else all rows at once."""
    if step.write(weight, _DESCENT):
        return
    exact = weight.float() if isinstance(weight, Tensor) else weight.values()
    _DESCENT.move(exact, step, 0, len(exact))
    if isinstance(weight, Tensor):
        round_into(weight, exact, _DESCENT.seed, _DESCENT.offset)
    else:
        weight.store(exact, (_DESCENT.seed, _DESCENT.offset))


def _coded(elements: int, device: torch.device, *, turned: bool) -> Tensors:
    """Codes of a weight about square, bfloat16 to multiply it by, and something to add."""
    width = math.isqrt(elements)
    width = max(width // _GROUP * _GROUP, min(width, _GROUP))  # where it can, of whole groups
    rows = elements // width
    inner, outer = (width, rows) if turned else (rows, width)
    x, added = (
        _numbers(_TOKENS * size, seed, device).bfloat16().view(_TOKENS, size)
        for size, seed in ((inner, 2), (outer, 3))
    )
    codes, scales, zeros = _grouped(rows * width, device)
    return x, codes.view(rows, width), scales, zeros, added


def _linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, added: Tensor) -> Tensors:
    return (int8_linear.linear(x, GroupedWeight(codes, scales, zeros, _GROUP), added),)


def _input_gradient(
    grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, added: Tensor
) -> Tensors:
    weight = GroupedWeight(codes, scales, zeros, _GROUP)
    return (int8_linear.input_gradient(grad, weight, added.clone()),)


def _wide(elements: int, device: torch.device) -> Tensors:
    """A bfloat16 matrix about twice as wide as high, and a symmetric one; a sixteenth of the
    elements, for every one of them is multiplied by a whole row."""
    side = max(1, math.isqrt(elements // 32))
    width = max(1, elements // (16 * side))
    x = _numbers(side * width, 1, device).bfloat16().view(side, width)
    added = _numbers(side * side, 2, device).bfloat16().view(side, side)
    return x, added + added.T


def _symmetric(x: Tensor, added: Tensor) -> Tensors:
    return (
        symmetric_product(x, added, alpha=0.5, beta=-2.0),
        symmetric_product(x, turned=True),
    )


def _two_matrices(elements: int, device: torch.device) -> Tensors:
    """Of about so many elements together, bfloat16, rows as long as high as both."""
    side = max(1, math.isqrt(elements // 2))
    first, second = (_numbers(side * side, seed, device).view(side, side) for seed in (1, 2))
    return _halves(first, second)


def _eight_bit(matrix: Tensor) -> Sequence[EightBit]:
    """What the device multiplies in; a plain CPU is asked for one of both."""
    return ("int8", "fp8") if matrix.is_cuda and scaled_matmul.multiplies_fp8() else ("int8",)


def _quantized(make: Callable[[Tensor, EightBit], Tensors], matrix: Tensor) -> Tensors:
    made = [each for kind in _eight_bit(matrix) for each in make(matrix, kind)]
    return tuple(each if each.dtype == torch.float32 else each.view(torch.int8) for each in made)


def _scaled_products(x: Tensor, weight: Tensor) -> Tensors:
    return tuple(scaled_matmul.linear(x, weight, kind, x) for kind in _eight_bit(x))


_TOKENS = 64  # of which a card reads a weight at the speed of its memory


def _halves(*tensors: Tensor) -> Tensors:
    return tuple(each.to(torch.bfloat16) for each in tensors)


def _matrices(elements: int, device: torch.device, count: int) -> Tensors:
    """So many bfloat16 matrices of up to _WIDTH columns."""
    width = min(elements, _WIDTH)
    whole = elements // width * width
    return _halves(*(_numbers(whole, seed, device).view(-1, width) for seed in range(count)))


def _norm(elements: int, device: torch.device) -> Tensors:
    """x and weight, and with them the rstd that the forward keeps."""
    x, other = _matrices(elements, device, 2)
    with forced("reference"):
        return x, other[0].clone(), rms_norm.rms_norm(x, other[0], 1e-6)[1]


def _norm_backward(elements: int, device: torch.device) -> Tensors:
    return *_norm(elements, device), _matrices(elements, device, 3)[2]


def _norm_gradients(x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> Tensors:
    made = grad.clone()
    return rms_norm.rms_norm_backward(made, x, weight, rstd), made


def _gated_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> Tensors:
    gate, up = gate.clone(), up.clone()
    swiglu.swiglu_backward(grad.clone(), gate, up)
    return gate, up


def _heads(elements: int, device: torch.device) -> Tensors:
    """Two sequences of heads of up to 64 features, and the angles of their positions."""
    half = min(max(1, elements // 12), 32)
    length = max(1, elements // (12 * half))
    (x,) = _halves(_numbers(12 * length * half, 1, device).view(2, length, 3, 2 * half))
    return x, *rope.tables(rope.frequencies(2 * half, 10000.0, device), length)


_WIDTH = 512

EXAMPLES = [
    Example(
        blockwise.QUANTIZE,
        lambda elements, device: (_numbers(elements, 1, device),),
        lambda x: blockwise.quantize(x, signed=True),
        bytes=5 + 1 / 64,
    ),
    Example(
        blockwise.DEQUANTIZE,
        _codes,
        lambda codes, absmax: (blockwise.dequantize(codes, absmax, signed=True),),
        bytes=5 + 1 / 64,
    ),
    Example(
        ADAM8,
        _moments,
        _adam8,
        bytes=12 + 4 + 4 / 64,
        tolerance=3e-7,  # of the step: oneMKL's sqrt may miss the last bit
    ),
    Example(
        ROUND,
        lambda elements, device: (_numbers(elements, 1, device),),
        _rounded,
        bytes=6,
    ),
    Example(
        groupwise.QUANTIZE,
        lambda elements, device: (_numbers(elements, 1, device),),
        _groups,
        bytes=5 + 5 / 128,
    ),
    Example(groupwise.DEQUANTIZE, _grouped, _ungrouped, bytes=3 + 5 / 128),
    *(
        Example(
            kernel,
            partial(_coded, turned=kernel is int8_linear.LINEAR),
            run,
            bytes=1 + 5 / 128,
            tolerance=2**-8,  # sums in float32 in another order may round the other way
        )
        for kernel, run in (
            (int8_linear.LINEAR, _linear),
            (int8_linear.INPUT_GRADIENT, _input_gradient),
        )
    ),
    Example(
        SYMMETRIC,
        _wide,
        _symmetric,
        bytes=(2 * (1 + 0.5 + 0.5) + 2 * (1 + 2)) / 16,  # but products take longer
        tolerance=2**-8,  # as above
    ),
    *(
        Example(
            kernel,
            lambda elements, device: _halves(_matrix(elements, 1, device)),
            partial(_quantized, make),
            bytes=3,
        )
        for kernel, make in (
            (scaled_matmul.ROW_CODES, scaled_matmul.row_codes),
            (scaled_matmul.COLUMN_CODES, scaled_matmul.column_codes),
        )
    ),
    Example(
        scaled_matmul.PRODUCT,
        _two_matrices,
        _scaled_products,
        bytes=4,  # but products take longer
        tolerance=2**-8,  # of fp8: sums in another order
    ),
    Example(
        unproject_write.WRITE,
        _unprojected,
        _written,
        bytes=6,
    ),
    Example(unproject_write.WRITE_CODES, _unprojected_codes, _written_codes, bytes=2 + 10 / 128),
    Example(
        NORMAL,
        lambda elements, device: (torch.empty(elements, device=device),),
        lambda like: (normal(like.numel(), 11, offset=2**32 - 200, device=like.device),),
        bytes=4,
    ),
    Example(
        drawn_projection.PROJECT,
        lambda elements, device: (_matrix(elements, 1, device),),
        _projections,
        bytes=2 * 4,
        tolerance=2e-6,  # sums in another order
    ),
    Example(
        drawn_projection.NORMS,
        lambda elements, device: (_matrix(elements, 1, device),),
        lambda full: tuple(channel_norms(full, right) for right in (True, False)),
        bytes=2 * 4,
        tolerance=2e-6,
    ),
    Example(
        SCALES,
        _norms_of_channels,
        _limited,
        bytes=4 * 4,
        tolerance=2e-6,
    ),
    Example(scaled_write.WRITE, _scaled_weight, _scaled_step, bytes=2 + 2 + 2),
    Example(scaled_write.WRITE_CODES, _scaled_codes, _scaled_step, bytes=2 + 1 + 1 + 10 / 128),
    Example(
        rms_norm.NORM,
        _norm,
        lambda x, weight, _: rms_norm.rms_norm(x, weight, 1e-6),
        bytes=4,
        tolerance=3e-7,
        neighbours=2,
    ),
    Example(
        rms_norm.AGAIN,
        _norm,
        lambda x, weight, rstd: (rms_norm.rms_norm_again(x, weight, rstd),),
        bytes=4,
    ),
    Example(
        rms_norm.BACKWARD,
        _norm_backward,
        _norm_gradients,
        bytes=6,
        tolerance=3e-7,
        neighbours=2,
    ),
    Example(
        swiglu.SWIGLU,
        lambda elements, device: _matrices(elements, device, 2),
        lambda gate, up: (swiglu.swiglu(gate, up),),
        bytes=6,
        tolerance=3e-7,
        neighbours=2,
    ),
    Example(
        swiglu.BACKWARD,
        lambda elements, device: _matrices(elements, device, 3),
        _gated_gradients,
        bytes=10,
        tolerance=3e-7,
        neighbours=2,
    ),
    Example(
        rope.ROTATE,
        _heads,
        lambda x, cos, sin: (rope.rotate_(x.clone(), cos, sin),),
        bytes=4,
        tolerance=3e-7,
        neighbours=2,
    ),
]


def difference(example: Example, found: Tensors, wanted: Tensors) -> str:
    """What differs from the reference by more than it may, for people; "" where nothing does."""
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours.is_floating_point() and example.tolerance and theirs.numel():
            exact = theirs.float()
            allowed = exact.abs().amax().mul(example.tolerance)
            if ours.dtype == torch.bfloat16:
                allowed = allowed + exact.abs() * (example.neighbours * 2**-7)
            wrong = (ours.float() - exact).abs().le(allowed).logical_not_()
        else:
            wrong = ours.ne(theirs)
        count = int(wrong.sum())
        if count:
            return f"{count} of {wrong.numel()} numbers of result {place} differ"
    return ""
