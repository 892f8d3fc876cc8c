"""Examples of `swiglu.py`."""

from torch import Tensor

from lowmem.kernels.example import Example, Tensors, token_rows
from lowmem.kernels.swiglu import BACKWARD, SWIGLU, swiglu, swiglu_backward


def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> Tensors:
    gate, up = gate.clone(), up.clone()
    swiglu_backward(grad.clone(), gate, up)
    return gate, up


EXAMPLES = [
    Example(
        SWIGLU,
        lambda elements, device: token_rows(elements, device, 2),
        lambda gate, up: (swiglu(gate, up),),
        bytes=6,
        tolerance=3e-7,
        neighbours=2,
    ),
    Example(
        BACKWARD,
        lambda elements, device: token_rows(elements, device, 3),
        _gradients,
        bytes=10,
        tolerance=3e-7,
        neighbours=2,
    ),
]
