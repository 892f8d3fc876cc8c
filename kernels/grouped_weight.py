"""A matrix of which only 8-bit codes exist, with a scale and a zero point per group.

    weight = GroupedWeight.of(exact)
    rows = weight.rows(0, 512)          # a view of whole groups
    values = rows.values()              # float32
    rows.store(values.add_(step))       # codes, scales and zero points anew

Groups run through the rows, so that a row length of any size will do; only the last group of the
matrix may be shorter.

Source: Zhang et al. 2024 (Q-GaLore), arXiv:2407.08296, section 3.4.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem.kernels.groupwise import (
    Groups,
    Noise,
    dequantize,
    group_count,
    quantize_into,
    uniform,
)

_BITS = 8


@dataclass
class GroupedWeight:
    """(codes - zero) * scale, for groups of consecutive elements.

    codes: uint8, contiguous, of the weight's shape. scales: float32, zeros: uint8, one per `group`
    elements. dtype: of its gradients. noise: of stochastic rounding in an update; None rounds to
    nearest, which drops steps below half a code. span_zero: see `kernels/groupwise.py`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int = 256
    dtype: torch.dtype = torch.bfloat16
    noise: Noise | None = uniform
    span_zero: bool = True

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], group: int, dtype: torch.dtype, device: torch.device | str
    ) -> "GroupedWeight":
        """Codes that are not filled yet."""
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        count = group_count(codes.numel(), group)
        scales = torch.empty(count, dtype=torch.float32, device=device)
        # A zero point is one of 256 codes: float32 would take three bytes more and say no more.
        zeros = torch.empty(count, dtype=torch.uint8, device=device)
        return cls(codes, scales, zeros, group, dtype)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        group: int = 256,
        noise: Noise | None = uniform,
        span_zero: bool = True,
    ) -> "GroupedWeight":
        """The codes nearest to a weight, whose dtype its gradients will have."""
        empty = cls.empty(tuple(weight.shape), group, weight.dtype, weight.device)
        made = replace(empty, noise=noise, span_zero=span_zero)
        made.store(weight.detach().float().contiguous())
        return made

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.codes.numel()

    def rows(self, start: int, stop: int) -> "GroupedWeight":
        """Some rows in the same memory; the first begins a group."""
        groups = self._groups(start, stop)
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[groups],
            zeros=self.zeros[groups],
        )

    def _groups(self, start: int, stop: int) -> slice:
        width = self.numel() // max(1, self.shape[0])
        return slice(start * width // self.group, -(-stop * width // self.group))

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for, worked out in float32 and rounded once to `dtype`."""
        return dequantize(self.codes, self.scales, self.zeros, self.group, dtype)

    def picked(self, index: Tensor) -> Tensor:
        """Rows by number in `dtype`: (n) int64 -> (n, width); no others are made floats."""
        width = self.shape[1]
        codes = self.codes.index_select(0, index)
        if width % self.group == 0:
            lines, group = width // self.group, self.group
            scales, zeros = (
                each.view(-1, lines).index_select(0, index).view(-1)
                for each in (self.scales, self.zeros)
            )
        else:  # rows begin inside of groups: every element looks up its own
            columns, group = torch.arange(width, device=index.device), 1
            elements = index.unsqueeze(1).mul(width).add(columns).view(-1)
            groups = elements.floor_divide_(self.group)
            scales, zeros = (each.index_select(0, groups) for each in (self.scales, self.zeros))
        return dequantize(codes, scales, zeros, group, self.dtype)

    def store(self, values: Tensor, at: tuple[int, int] | None = None) -> None:
        """Take new values: float32, contiguous, of this shape.

        at: (seed, number of the first element) for the noise, if there is one; None: no noise.
        """
        into = Groups(self.codes, self.scales, self.zeros)
        if self.noise is None or at is None:
            quantize_into(into, values, _BITS, self.group, span_zero=self.span_zero)
        else:
            quantize_into(into, values, _BITS, self.group, at, self.noise, self.span_zero)


Weight = Tensor | GroupedWeight


def float_rows(weight: Weight, start: int, stop: int) -> Tensor:
    """Rows in the dtype of their gradients: a view, or made of codes, where a group must begin."""
    if isinstance(weight, Tensor):
        return weight[start:stop]
    return weight.rows(start, stop).values(weight.dtype)
