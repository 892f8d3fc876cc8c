"""A linear layer of which only 8-bit codes exist; `kernels/int8_linear.py` multiplies by them.

    layer = Int8Linear(4096, 11008, bias=False, dtype=torch.bfloat16, device="cuda")
    layer(x)                        # x W' + b
    layer.input_gradient(grad)      # grad W

The gradient of the weight is made by the block and never meets the codes.
"""

import torch
from torch import Tensor, nn

from lowmem.kernels import int8_linear
from lowmem.kernels.grouped_weight import GroupedWeight

GROUP = 128  # elements that share a scale and a zero point


class Int8Linear(nn.Module):
    """`block.Linear` with uninitialised codes for the weight (outputs, inputs).

    dtype: of activations, gradients and the bias.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        empty = GroupedWeight.empty((outputs, inputs), GROUP, dtype, device)
        self.register_buffer("codes", empty.codes)
        self.register_buffer("scales", empty.scales)
        self.register_buffer("zeros", empty.zeros)
        make = torch.empty(outputs, dtype=dtype, device=device) if bias else None
        self.bias = None if make is None else nn.Parameter(make)

    @property
    def weight(self) -> GroupedWeight:
        """What the optimizer moves: the layer's own codes, in the same memory."""
        return GroupedWeight(self.codes, self.scales, self.zeros, GROUP, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W' + b in one new tensor."""
        out = int8_linear.linear(x, self.weight, residual)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad W: (n, outputs) -> (n, inputs)."""
        return int8_linear.input_gradient(grad, self.weight)

    def add_input_gradient(self, total: Tensor, grad: Tensor) -> None:
        """total += grad W, in place."""
        int8_linear.input_gradient(grad, self.weight, total)
