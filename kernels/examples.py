"""A case of every kernel: what `lowmem doctor --kernels` and `lowmem bench kernels` run.

for example in EXAMPLES:
    changed = example.run(*example.make(2**20, torch.device("cuda")))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels import blockwise, groupwise, rms_norm, rope, swiglu
from lowmem.kernels.adam8 import ADAM8, Moment8, add_adam8_direction
from lowmem.kernels.dispatch import Kernel, forced
from lowmem.kernels.random_normal import NORMAL, normal
from lowmem.kernels.rounding import ROUND, round_into

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """make(elements, device): arguments. run(*arguments): all that is new or has changed.

    bytes: read and written per element, at least. Integers and scales have to be those of the
    reference; tolerance: of other floats, relative to the largest of the reference. Where there is
    one, a bfloat16 may also lie two neighbours off: what is rounded twice meets a tie otherwise.
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


_NEIGHBOURS = {torch.float32: 0.0, torch.bfloat16: 2**-6}  # two, relative
_GROUP = 128
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
    Example(
        NORMAL,
        lambda elements, device: (torch.empty(elements, device=device),),
        lambda like: (normal(like.numel(), 11, offset=2**32 - 200, device=like.device),),
        bytes=4,
    ),
    Example(
        rms_norm.NORM,
        _norm,
        lambda x, weight, _: rms_norm.rms_norm(x, weight, 1e-6),
        bytes=4,
        tolerance=3e-7,
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
    ),
    Example(
        swiglu.SWIGLU,
        lambda elements, device: _matrices(elements, device, 2),
        lambda gate, up: (swiglu.swiglu(gate, up),),
        bytes=6,
        tolerance=3e-7,
    ),
    Example(
        swiglu.BACKWARD,
        lambda elements, device: _matrices(elements, device, 3),
        _gated_gradients,
        bytes=10,
        tolerance=3e-7,
    ),
    Example(
        rope.ROTATE,
        _heads,
        lambda x, cos, sin: (rope.rotate_(x.clone(), cos, sin),),
        bytes=4,
        tolerance=3e-7,
    ),
]


def difference(example: Example, found: Tensors, wanted: Tensors) -> str:
    """What differs from the reference by more than it may, for people; "" where nothing does."""
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours.is_floating_point() and example.tolerance and theirs.numel():
            exact = theirs.float()
            allowed = (exact.abs() * _NEIGHBOURS[ours.dtype]).add_(
                example.tolerance * exact.abs().amax()
            )
            wrong = (ours - exact).abs().le(allowed).logical_not_()
        else:
            wrong = ours.ne(theirs)
        count = int(wrong.sum())
        if count:
            return f"{count} of {wrong.numel()} numbers of result {place} differ"
    return ""
