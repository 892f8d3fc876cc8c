"""A linear layer of which only 8-bit codes exist; rows are made floats a slice at a time.

    layer = Int8Linear(4096, 11008, bias=False, dtype=torch.bfloat16, device="cuda")
    layer(x)                        # x W' + b
    layer.input_gradient(grad)      # grad W

A slice of rows is the only full-precision copy that ever exists, and no two at a time. The gradient
of the weight is made by the block and never meets the codes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.slices import divided, row_slices

GROUP = 128  # elements that share a scale and a zero point
SLICE_ELEMENTS = 2**24  # of full precision at a time: 32 MiB in bf16


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
        return self._product(x, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W' + b in one new tensor."""
        out = self._product(x, residual)
        return out if self.bias is None else out.add_(self.bias)

    def _product(self, x: Tensor, added: Tensor | None) -> Tensor:
        """added + x W', a slice of columns at a time, each written in place.

        added: (outputs) or (n, outputs).
        """
        out = x.new_empty(len(x), len(self.codes))
        for start, stop in self._slices():
            columns = out[:, start:stop]
            if added is None:
                torch.mm(x, self._rows(start, stop).t(), out=columns)
            else:
                part = added[..., start:stop]
                torch.addmm(part, x, self._rows(start, stop).t(), out=columns)
        return out

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad W: (n, outputs) -> (n, inputs)."""
        slices = self._slices()
        start, stop = next(slices)
        out = grad[:, start:stop] @ self._rows(start, stop)
        for start, stop in slices:
            out.addmm_(grad[:, start:stop], self._rows(start, stop))
        return out

    def add_input_gradient(self, total: Tensor, grad: Tensor) -> None:
        """total += grad W, in place."""
        for start, stop in self._slices():
            total.addmm_(grad[:, start:stop], self._rows(start, stop))

    def _slices(self) -> Iterator[tuple[int, int]]:
        return row_slices(self.codes, GROUP, divided(SLICE_ELEMENTS))

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.weight.rows(start, stop).values(self.dtype)
