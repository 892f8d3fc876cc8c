"""A case of every kernel: what `lowmem doctor --kernels` and `lowmem bench kernels` run.

for example in EXAMPLES:
    changed = example.run(*example.make(2**20, torch.device("cuda")))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem.kernels import blockwise, groupwise, int8_linear
from lowmem.kernels.adam8 import ADAM8, Moment8, add_adam8_direction
from lowmem.kernels.dispatch import Kernel, forced
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.newton_schulz import SYMMETRIC, symmetric_product
from lowmem.kernels.random_normal import NORMAL, normal
from lowmem.kernels.rounding import ROUND, round_into

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """make(elements, device): arguments. run(*arguments): all that is new or has changed.

    bytes: read and written per element, at least. Integers and scales have to be those of the
    reference; tolerance: of other floats, relative to the largest of the reference.
    """

    kernel: Kernel
    make: Callable[[int, torch.device], Tensors]
    run: Callable[..., Tensors]
    bytes: float
    tolerance: float = 0.0


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


def _product(elements: int, device: torch.device, *, turned: bool) -> Tensors:
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


_GROUP = 128
_TOKENS = 64  # of which a card reads a weight at the speed of its memory

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
            partial(_product, turned=kernel is int8_linear.LINEAR),
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
    Example(
        NORMAL,
        lambda elements, device: (torch.empty(elements, device=device),),
        lambda like: (normal(like.numel(), 11, offset=2**32 - 200, device=like.device),),
        bytes=4,
    ),
]


def difference(example: Example, found: Tensors, wanted: Tensors) -> str:
    """What differs from the reference by more than it may, for people; "" where nothing does."""
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours.is_floating_point() and example.tolerance:
            least = example.tolerance * theirs.abs().amax() if theirs.numel() else 0.0
            wrong = (ours.float() - theirs.float()).abs().le(least).logical_not_()
        else:
            wrong = ours.ne(theirs)
        count = int(wrong.sum())
        if count:
            return f"{count} of {wrong.numel()} numbers of result {place} differ"
    return ""
