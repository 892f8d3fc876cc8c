"""The gated unit of LLaMA's MLP: t = silu(gate) * up, and its gradients.

With s = sigmoid(gate): d t / d up = gate s, d t / d gate = up s (1 + gate (1 - s)).

Source: Shazeer, arXiv:2002.05202.
"""

import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels.compiled import asked_to_compile, run
from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.slices import pieces

SWIGLU = Kernel("swiglu(Tensor gate, Tensor up, Tensor(a!) product) -> ()", triton="swiglu_triton")
BACKWARD = Kernel(
    "swiglu_backward(Tensor grad, Tensor(a!) gate, Tensor(b!) up) -> ()", triton="swiglu_triton"
)

SLICE_ELEMENTS = 2**21  # of the backward's scratch


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (n, f)."""
    if not asked_to_compile() and SWIGLU.runs_on(gate):
        product = torch.empty_like(gate)
        SWIGLU(gate, up, product)
        return product
    return run(_product, gate, up)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Turn `gate` and `up` (n, f) into their own gradients; `grad`, that of t, is used up."""
    if not asked_to_compile() and BACKWARD.runs_on(gate):
        BACKWARD(grad, gate, up)
        return
    rows = max(1, SLICE_ELEMENTS // gate.shape[-1])
    for start, stop in pieces(len(gate), rows, gate.is_meta):
        run(_rows_backward, grad[start:stop], gate[start:stop], up[start:stop])


def _rows_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    scratch = functional.silu(gate).mul_(grad)
    grad.mul_(up)
    up.copy_(scratch)
    torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=gate)
