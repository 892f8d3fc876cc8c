"""`swiglu.py` in Triton: one pass over the elements, nothing beside them."""

import triton
import triton.language as tl
from torch import Tensor

from lowmem.kernels.rounding_triton import packed, raw, rounded_as, unpacked

_SIZE = 1024  # elements of a program


def swiglu(gate: Tensor, up: Tensor, product: Tensor) -> None:
    if gate.numel():
        _forward[(triton.cdiv(gate.numel(), _SIZE),)](
            raw(gate), raw(up), raw(product), gate.numel(), SIZE=_SIZE, enable_fp_fusion=False
        )


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    if gate.numel():
        _backward[(triton.cdiv(gate.numel(), _SIZE),)](
            raw(grad), raw(gate), raw(up), gate.numel(), SIZE=_SIZE, enable_fp_fusion=False
        )


@triton.jit
def _forward(gate, up, product, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    a = unpacked(tl.load(gate + at, at < count, 0))
    b = unpacked(tl.load(up + at, at < count, 0))
    made = rounded_as(tl.div_rn(a, 1.0 + tl.exp(-a)), product.dtype.element_ty) * b
    tl.store(product + at, packed(made, product.dtype.element_ty), at < count)


@triton.jit
def _backward(grad, gate, up, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    g = unpacked(tl.load(grad + at, at < count, 0))
    a = unpacked(tl.load(gate + at, at < count, 0))
    b = unpacked(tl.load(up + at, at < count, 0))
    below = 1.0 + tl.exp(-a)
    grad_up = rounded_as(tl.div_rn(a, below), up.dtype.element_ty) * g
    tl.store(up + at, packed(grad_up, up.dtype.element_ty), at < count)
    s = tl.div_rn(tl.full(a.shape, 1.0, tl.float32), below)
    grad_gate = rounded_as(g * b, gate.dtype.element_ty) * s * (1.0 + a * (1.0 - s))
    tl.store(gate + at, packed(grad_gate, gate.dtype.element_ty), at < count)
