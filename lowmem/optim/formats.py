"""How a state tensor is stored: float32, bfloat16, or blockwise 8-bit.

    FORMATS["8bit"].zeros(state, "exp_avg", like=low, signed=True)
        -> state["exp_avg.codes"], state["exp_avg.absmax"]
    piece = format.load(state, "exp_avg", slice(0, 1024))    # float32, 1024 elements
    piece.mul_(0.9)
    format.store(state, "exp_avg", slice(0, 1024), piece)

Slices are of the flattened tensor and begin at multiples of 256 elements.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.kernels.adam8 import Moment8
from lowmem.kernels.blockwise import block_count, dequantize, quantize
from lowmem.kernels.rounding import round_into
from lowmem.kernels.slices import BLOCK, flat_slices
from lowmem.naming import seed_of

State = dict[str, Tensor | int | float]
"""All that varies of one parameter's method: flat, plain, stable names; nothing else ever."""


def tensor(state: State, key: str) -> Tensor:
    """The tensor under `key`; a number there is a programming error."""
    value = state[key]
    if not isinstance(value, Tensor):
        raise TypeError(f"state {key!r} is {type(value).__name__}, not a tensor")
    return value


def number(state: State, key: str) -> int:
    """The integer under `key`."""
    value = state[key]
    if not isinstance(value, int):
        raise TypeError(f"state {key!r} is {type(value).__name__}, not an integer")
    return value


class Format(Protocol):
    def zeros(self, state: State, key: str, like: Tensor, signed: bool) -> None:
        """Allocate a state tensor of like's shape on its device, filled with zero."""

    def load(self, state: State, key: str, piece: slice) -> Tensor:
        """That piece as float32, to be changed in place and given back to `store`."""

    def store(self, state: State, key: str, piece: slice, value: Tensor) -> None: ...


@dataclass(frozen=True)
class Float32:
    """Plain float32."""

    def zeros(self, state: State, key: str, like: Tensor, signed: bool) -> None:
        state[key] = torch.zeros_like(like, dtype=torch.float32)

    def load(self, state: State, key: str, piece: slice) -> Tensor:
        return tensor(state, key).view(-1)[piece]

    def store(self, state: State, key: str, piece: slice, value: Tensor) -> None:
        """Nothing to do: `load` gave a view."""


@dataclass(frozen=True)
class BFloat16:
    """Written with stochastic rounding: bf16 * 0.999 rounds back to itself, so a second moment
    that is rounded to nearest never decays."""

    def zeros(self, state: State, key: str, like: Tensor, signed: bool) -> None:
        state[key] = torch.zeros_like(like, dtype=torch.bfloat16)

    def load(self, state: State, key: str, piece: slice) -> Tensor:
        return tensor(state, key).view(-1)[piece].float()

    def store(self, state: State, key: str, piece: slice, value: Tensor) -> None:
        seed = seed_of(number(state, "seed"), key, number(state, "step"))
        round_into(tensor(state, key).view(-1)[piece], value, seed, piece.start)


@dataclass(frozen=True)
class Blockwise8:
    """8-bit codes with a scale per 256 elements; tensors below `min_elements` stay float32.

    floor_codes: a positive second moment is never stored as zero (see `kernels/blockwise.py`).
    """

    min_elements: int = 4096
    floor_codes: bool = True

    def zeros(self, state: State, key: str, like: Tensor, signed: bool) -> None:
        if like.numel() < self.min_elements:
            return Float32().zeros(state, key, like, signed)
        # The code of 0.0 is 127 in the signed map, 0 in the other.
        state[f"{key}.codes"] = torch.full_like(like, 127 if signed else 0, dtype=torch.uint8)
        state[f"{key}.absmax"] = torch.zeros(
            block_count(like.numel()), dtype=torch.float32, device=like.device
        )
        state[f"{key}.signed"] = int(signed)

    def load(self, state: State, key: str, piece: slice) -> Tensor:
        if key in state:
            return Float32().load(state, key, piece)
        return dequantize(*self.codes(state, key, piece), bool(state[f"{key}.signed"]))

    def codes(self, state: State, key: str, piece: slice) -> Moment8:
        """That piece as it is stored, in the same memory."""
        codes = tensor(state, f"{key}.codes").view(-1)[piece]
        return Moment8(codes, tensor(state, f"{key}.absmax")[_blocks(piece)])

    def store(self, state: State, key: str, piece: slice, value: Tensor) -> None:
        if key in state:
            return
        found = quantize(value, bool(state[f"{key}.signed"]), self.floor_codes)
        for kept, new in zip(self.codes(state, key, piece), found, strict=True):
            kept.copy_(new)


def _blocks(piece: slice) -> slice:
    return slice(piece.start // BLOCK, block_count(piece.stop))


def is_float32(state: State, key: str) -> bool:
    """Is that state tensor stored as it is, in float32?"""
    return key in state and tensor(state, key).dtype == torch.float32


def fill_zero(state: State, *keys: str) -> None:
    """Make state tensors of any format zero, in place."""
    for key in keys:
        if key in state:
            tensor(state, key).zero_()
        else:  # codes mean nothing at scale 0
            tensor(state, f"{key}.absmax").zero_()


def turned(format: Format, state: State, key: str, transition: Tensor, right: bool) -> None:
    """Multiply a projected moment by `transition` on its rank axis, in place.

    transition: (r, r). right: the moment is (m, r), otherwise (r, n).
    """
    low = tensor(state, key if key in state else f"{key}.codes")
    moment = torch.empty(low.shape, dtype=torch.float32, device=low.device)
    for piece in flat_slices(low):
        moment.view(-1)[piece] = format.load(state, key, piece)
    transition = transition.float()
    moment = moment @ transition.T if right else transition @ moment
    for piece in flat_slices(low):
        target = format.load(state, key, piece)
        target.copy_(moment.view(-1)[piece])
        format.store(state, key, piece, target)


def format_named(name: str, min_elements: int = 4096, floor_codes: bool = True) -> Format:
    """The format called fp32, bf16 or 8bit."""
    formats: dict[str, Format] = {
        "fp32": Float32(),
        "bf16": BFloat16(),
        "8bit": Blockwise8(min_elements, floor_codes),
    }
    return formats[name]
