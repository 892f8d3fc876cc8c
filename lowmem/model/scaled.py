"""Linear layers whose products are made in 8 bits; the formula is in `kernels/scaled_matmul.py`.

    linear = layer_type(int8=False, matmul="fp8")
    layer = linear(4096, 11008, bias=False, dtype=torch.bfloat16, device="cuda")

The gradient passes the rounding as if there were none, and that of the weight, which the block
makes of the activations themselves, is exact. Weights are kept, moved and saved as in any layer.
"""

from functools import partial
from typing import Any

from torch import Tensor

from lowmem.config.schema import Matmul
from lowmem.kernels import scaled_matmul
from lowmem.kernels.scaled_matmul import EightBit
from lowmem.model.block import Linear, LinearType
from lowmem.model.int8 import Int8Linear


class _ScaledProducts:
    """The products that a block asks of a layer, in 8 bits."""

    weight: Any
    bias: Any
    kind: EightBit

    def forward(self, x: Tensor) -> Tensor:
        return scaled_matmul.linear(x, self.weight, self.kind, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W' + b in one new tensor."""
        out = scaled_matmul.linear(x, self.weight, self.kind, residual)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad W: (n, outputs) -> (n, inputs)."""
        return scaled_matmul.input_gradient(grad, self.weight, self.kind)

    def add_input_gradient(self, total: Tensor, grad: Tensor) -> None:
        """total += grad W, in place."""
        scaled_matmul.input_gradient(grad, self.weight, self.kind, total)


class ScaledLinear(_ScaledProducts, Linear):
    """`Linear` with float weights and products in `kind`."""

    def __init__(self, inputs: int, outputs: int, *, kind: EightBit, **how: Any) -> None:
        super().__init__(inputs, outputs, **how)
        self.kind = kind


class ScaledInt8Linear(_ScaledProducts, Int8Linear):
    """`Int8Linear`, whose codes are made floats and quantised anew, by rows, for the product."""

    def __init__(self, inputs: int, outputs: int, *, kind: EightBit, **how: Any) -> None:
        super().__init__(inputs, outputs, **how)
        self.kind = kind


def layer_type(*, int8: bool, matmul: Matmul) -> LinearType:
    """What makes the linear layers of blocks. int8: their weights are codes."""
    if matmul == "exact":
        return Int8Linear if int8 else Linear
    return partial(ScaledInt8Linear if int8 else ScaledLinear, kind=matmul)
