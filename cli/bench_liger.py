"""The operators of a block and the head beside Liger's, on a card: a part of `bench kernels`.

Forward and backward of both on the same tensors. What it prints settles whose the model runs.

Liger: Hsu et al. 2024, arXiv:2410.10989; pip install liger-kernel.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem.cli.console import Console
from lowmem.kernels.example import Tensors
from lowmem.kernels.linear_cross_entropy import cross_entropy, cross_entropy_backward
from lowmem.kernels.measure import cache_bytes, median_seconds, rotating
from lowmem.kernels.random_normal import normal
from lowmem.kernels.rms_norm import rms_norm, rms_norm_backward
from lowmem.kernels.rope import frequencies, rotate_, tables
from lowmem.kernels.rounding import hashed_bits
from lowmem.kernels.swiglu import swiglu, swiglu_backward
from lowmem.units import format_bytes

_EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of a micro-batch and a model."""

    sequences: int
    length: int
    hidden: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


SIZES = Sizes(4, 1024, 4096, 32, 32, 11008, 32000)  # 7B's


@dataclass(frozen=True)
class Pair:
    """The same work twice. make: arguments; ours, liger: values and gradients from them.

    Both may overwrite their arguments, and give what they have overwritten.
    """

    operator: str
    make: Callable[[Sizes, torch.dtype, torch.device], Tensors]
    ours: Callable[..., Tensors]
    liger: Callable[..., Tensors]


@dataclass(frozen=True)
class BesideLiger:
    """Seconds of forward and backward, and bytes of memory at most beside the arguments."""

    operator: str
    seconds: float
    liger_seconds: float
    bytes: int
    liger_bytes: int


def why_no_liger(device: torch.device) -> str:
    """For people; empty where it can run."""
    if device.type != "cuda":
        return "Liger's kernels run on a card only"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed, optional: pip install liger-kernel"
    return ""


def beside_liger(device: torch.device) -> Iterator[BesideLiger]:
    """A row for every pair, in bfloat16; none where Liger cannot run."""
    for pair in () if why_no_liger(device) else PAIRS:
        make = partial(pair.make, SIZES, torch.bfloat16, device)
        (ours, bytes), (theirs, their_bytes) = (
            _measured(make, run, device) for run in (pair.ours, pair.liger)
        )
        yield BesideLiger(pair.operator, ours, theirs, bytes, their_bytes)


def _measured(
    make: Callable[[], Tensors], run: Callable[..., Tensors], device: torch.device
) -> tuple[float, int]:
    work = rotating(make, run, cache_bytes(device))
    return median_seconds(work, device), peak_bytes(work, device)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Memory of a card that the work takes at most."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def show_liger(console: Console, rows: list[BesideLiger], device: torch.device) -> None:
    """The table, or why there is none."""
    if not rows:
        console.say(why_no_liger(device))
        return
    console.say(f"forward and backward of {SIZES.tokens:,} tokens beside Liger, sizes of 7B, bf16")
    columns = ["operator", ">time", ">Liger", ">ratio", ">memory", ">Liger's"]
    cells = [
        [
            row.operator,
            f"{1e3 * row.seconds:.3f} ms",
            f"{1e3 * row.liger_seconds:.3f} ms",
            f"{row.seconds / row.liger_seconds:.2f}",
            format_bytes(row.bytes),
            format_bytes(row.liger_bytes),
        ]
        for row in rows
    ]
    console.table(columns, cells)


def _drawn(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return normal(math.prod(shape), seed, device=device).view(shape).to(dtype)


def _leaves(*tensors: Tensor) -> Tensors:
    """The same memory, where autograd begins."""
    return tuple(each.detach().requires_grad_() for each in tensors)


def _norm_arguments(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensors:
    """x and the gradient of y (n, h), weight (h)."""
    draw = partial(_drawn, dtype=dtype, device=device)
    x, grad = (draw(seed, sizes.tokens, sizes.hidden) for seed in (1, 2))
    return x, grad, draw(3, sizes.hidden)


def _norm(x: Tensor, grad: Tensor, weight: Tensor) -> Tensors:
    y, rstd = rms_norm(x, weight, _EPS)
    grad_weight = rms_norm_backward(grad, x, weight, rstd)
    return y, grad, grad_weight


def _liger_norm(x: Tensor, grad: Tensor, weight: Tensor) -> Tensors:
    from liger_kernel.ops import LigerRMSNormFunction

    leaves = _leaves(x, weight)
    y = LigerRMSNormFunction.apply(*leaves, _EPS, 0.0, "llama", True)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def _gate_arguments(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensors:
    """gate, up and the gradient of their product, (n, f)."""
    draw = partial(_drawn, dtype=dtype, device=device)
    return tuple(draw(seed, sizes.tokens, sizes.mlp) for seed in (1, 2, 3))


def _gate(gate: Tensor, up: Tensor, grad: Tensor) -> Tensors:
    product = swiglu(gate, up)
    swiglu_backward(grad, gate, up)
    return product, gate, up


def _liger_gate(gate: Tensor, up: Tensor, grad: Tensor) -> Tensors:
    from liger_kernel.ops import LigerSiLUMulFunction

    leaves = _leaves(gate, up)
    product = LigerSiLUMulFunction.apply(*leaves)
    return product.detach(), *torch.autograd.grad(product, leaves, grad)


def _rotation_arguments(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensors:
    """q, k, their gradients (B, T, H, D); cos and sin (T, D/2), and as Liger has them: (T, D)."""
    width = sizes.hidden // sizes.heads
    q, k, grad_q, grad_k = (
        _drawn(seed, sizes.sequences, sizes.length, heads, width, dtype=dtype, device=device)
        for seed, heads in enumerate(2 * (sizes.heads, sizes.key_value_heads))
    )
    angles = tables(frequencies(width, 10000.0, device), sizes.length)
    return q, k, grad_q, grad_k, *angles, *(torch.cat((each, each), 1) for each in angles)


def _rotation(
    q: Tensor, k: Tensor, grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, *_: Tensor
) -> Tensors:
    for each in (q, k):
        rotate_(each, cos, sin)
    for each in (grad_q, grad_k):
        rotate_(each, cos, sin, back=True)
    return q, k, grad_q, grad_k


def _liger_rotation(
    q: Tensor, k: Tensor, grad_q: Tensor, grad_k: Tensor, *angles: Tensor
) -> Tensors:
    from liger_kernel.ops import LigerRopeFunction

    leaves = _leaves(q, k)
    turned = LigerRopeFunction.apply(*(each.transpose(1, 2) for each in leaves), *angles[2:])
    grads = (grad_q.transpose(1, 2), grad_k.transpose(1, 2))
    gradients = torch.autograd.grad(turned, leaves, grads)
    return *(each.detach().transpose(1, 2) for each in turned), *gradients


def _head_arguments(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensors:
    """x (n, h), weight (V, h) with logits of about normal size, targets (n)."""
    draw = partial(_drawn, dtype=dtype, device=device)
    x, weight = draw(1, sizes.tokens, sizes.hidden), draw(2, sizes.vocabulary, sizes.hidden)
    targets = hashed_bits(sizes.tokens, 3, 0, device).long().remainder_(sizes.vocabulary)
    return x, weight.mul_(sizes.hidden**-0.5), targets


def _head(x: Tensor, weight: Tensor, targets: Tensor, *, keep_logits: bool) -> Tensors:
    scale, grad_weight = 1 / len(x), torch.empty_like(weight)

    def take(start: int, rows: Tensor) -> None:
        grad_weight[start : start + len(rows)] = rows

    loss, softmax = cross_entropy(x, weight, targets, scale, keep_logits=keep_logits)
    grad_x = cross_entropy_backward(x, weight, targets, scale, softmax, take)
    return loss, grad_x.to(x.dtype), grad_weight


def _liger_head(x: Tensor, weight: Tensor, targets: Tensor) -> Tensors:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    leaves = _leaves(x, weight)
    loss = LigerFusedLinearCrossEntropyFunction.apply(*leaves, targets)[0]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


PAIRS = (
    Pair("RMSNorm", _norm_arguments, _norm, _liger_norm),
    Pair("SwiGLU", _gate_arguments, _gate, _liger_gate),
    Pair("RoPE", _rotation_arguments, _rotation, _liger_rotation),
    Pair("head, logits kept", _head_arguments, partial(_head, keep_logits=True), _liger_head),
    Pair("head", _head_arguments, partial(_head, keep_logits=False), _liger_head),
)
