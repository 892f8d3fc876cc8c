"""Sums over the micro-batches of an update, of gradients or of their projections.

    total = RoundedSum.zeros((4096, 4096), device)        # or CodedSum, HostSum
    total.add(gradient, first=0, seed=1)                  # per micro-batch, or slice by slice
    total.values(0, 4096)                                 # float32, the first 4096 elements

    fp32   a tensor, to which the optimizer adds by itself
    bf16   RoundedSum   rounded stochastically after every addition
    int8   CodedSum     the same, in codes with a scale per 256 elements
    host   HostSum      float32 in host memory; slices visit the device to be added to

Rounding is right on average and its noise a function of (seed, element), so a repeated update has
the same bits. Arithmetic is float32 in all of them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.config.schema import SumFormat
from lowmem.kernels.blockwise import block_count
from lowmem.kernels.groupwise import uniform
from lowmem.kernels.rounding import round_into
from lowmem.kernels.signed_codes import dequantize, quantize
from lowmem.kernels.slices import flat_slices, slice_elements
from lowmem.transfers import Mark, Transfers

LEAST_ELEMENTS = 4096  # smaller tensors (norms, biases) are summed in float32 whatever the format
_PLACES = 4  # slices of host sums that may be on their way at once


class Sum(Protocol):
    """What has been added up so far. `first` and `start` count elements, from multiples of 256."""

    @property
    def shape(self) -> torch.Size: ...

    def add(self, piece: Tensor, first: int, seed: int) -> None:
        """Add the elements first, first + 1, ... of a micro-batch; those before have been added."""

    def values(self, start: int, stop: int) -> Tensor:
        """These elements, flat, in float32, in memory of their own."""

    def whole(self) -> Tensor:
        """Everything, in the sum's shape; may be the sum's own memory."""

    def square(self) -> Tensor:
        """The sum of squares: 0-dim, float32."""


@dataclass
class RoundedSum:
    """total: bfloat16."""

    total: Tensor

    @classmethod
    def zeros(cls, shape: torch.Size, device: torch.device) -> "RoundedSum":
        return cls(torch.zeros(shape, dtype=torch.bfloat16, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.total.shape

    def add(self, piece: Tensor, first: int, seed: int) -> None:
        flat, total = piece.reshape(-1), self.total.view(-1)
        for at in flat_slices(flat):
            own = total[first + at.start : first + at.stop]
            round_into(own, own.float().add_(flat[at]), seed, first + at.start)

    def values(self, start: int, stop: int) -> Tensor:
        return self.total.view(-1)[start:stop].float()

    def whole(self) -> Tensor:
        return self.total

    def square(self) -> Tensor:
        return square(self.total)


@dataclass
class CodedSum:
    """codes: int8, of the sum's shape. scales: float32, one per 256 elements in memory order."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, shape: torch.Size, device: torch.device) -> "CodedSum":
        codes = torch.zeros(shape, dtype=torch.int8, device=device)
        scales = torch.zeros(block_count(codes.numel()), dtype=torch.float32, device=device)
        return cls(codes, scales)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def add(self, piece: Tensor, first: int, seed: int) -> None:
        flat = piece.reshape(-1)
        for at in flat_slices(flat):
            start, stop = first + at.start, first + at.stop
            exact = self.values(start, stop).add_(flat[at])
            noise = uniform(exact.numel(), seed, start, exact.device)
            codes, scales = quantize(exact, noise)
            self.codes.view(-1)[start:stop] = codes
            self.scales[_blocks(start, stop)] = scales

    def values(self, start: int, stop: int) -> Tensor:
        return dequantize(self.codes.view(-1)[start:stop], self.scales[_blocks(start, stop)])

    def whole(self) -> Tensor:
        found = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        for at in flat_slices(found):
            found.view(-1)[at] = self.values(at.start, at.stop)
        return found

    def square(self) -> Tensor:
        squares = torch.zeros((), dtype=torch.float32, device=self.codes.device)
        for at in flat_slices(self.codes):
            squares.add_(square(self.values(at.start, at.stop)))
        return squares


def _blocks(start: int, stop: int) -> slice:
    return slice(block_count(start), block_count(stop))


class Staging:
    """Where slices of host sums visit a device, and where in host memory the sums are.

    Every place holds a slice of a gradient and of its sum, in float32. A gradient is copied to the
    places and may then be forgotten; computing goes on while its slices are added up, and waits
    where all places are taken. The host memory of a weight's sum stays its own in all updates.
    """

    def __init__(self, like: Tensor) -> None:
        self.elements = slice_elements(like)
        self.transfers = Transfers(like.device)
        self.places = [
            torch.empty((2, self.elements), dtype=torch.float32, device=like.device)
            for _ in range(_PLACES)
        ]
        self._homes: dict[str, Tensor] = {}
        self._free: list[Mark] = [None] * _PLACES  # from when on
        self._turn = 0

    def home(self, name: str, elements: int) -> Tensor:
        """Host memory for the sum of that weight: (elements), float32."""
        known = self._homes.get(name)
        if known is None or len(known) != elements:
            self._homes.pop(name, None)  # before the other is made
            self._homes[name] = self.transfers.host((elements,), torch.float32)
        return self._homes[name]

    def add(self, home: Tensor, piece: Tensor, fresh: bool) -> None:
        """home (host memory) <- home + piece, at most a slice; fresh: nothing is there yet."""
        transfers = self.transfers
        turn = self._turn = (self._turn + 1) % _PLACES
        transfers.compute_waits(self._free[turn])
        added, before = self.places[turn][:, : piece.numel()]
        added.copy_(piece)
        with transfers.beside() as mark:
            if not fresh:
                before.copy_(home, non_blocking=True)
                transfers.fetched += home.nbytes
                added.add_(before)
            home.copy_(added, non_blocking=True)
            transfers.stored += home.nbytes
            self._free[turn] = mark()


@dataclass
class HostSum:
    """name: of the weight. filled: elements that something was added to."""

    name: str
    shape: torch.Size
    staging: Staging
    filled: int = 0

    def __post_init__(self) -> None:
        self.home = self.staging.home(self.name, self.shape.numel())  # float32, in host memory

    def add(self, piece: Tensor, first: int, seed: int) -> None:
        flat, fresh, unit = piece.reshape(-1), first >= self.filled, self.staging.elements
        for start in range(0, len(flat), unit):
            part = flat[start : start + unit]
            at = first + start
            self.staging.add(self.home[at : at + len(part)], part, fresh)
        self.filled = max(self.filled, first + len(flat))

    def values(self, start: int, stop: int) -> Tensor:
        return self.staging.transfers.fetch(self.home[start:stop]).arrived()

    def whole(self) -> Tensor:
        return self.values(0, self.shape.numel()).view(self.shape)

    def square(self) -> Tensor:
        return square(self.whole())  # whole: in slices its last bit would not be that of fp32


Held = Tensor | Sum
"""What is kept of a gradient: the only one, or a sum in float32, or a sum of another format."""


def square(piece: Held) -> Tensor:
    """The sum of squares: 0-dim, float32."""
    if not isinstance(piece, Tensor):
        return piece.square()
    return torch.linalg.vector_norm(piece, dtype=torch.float32).square()


def is_tensor(format: SumFormat, shape: torch.Size) -> bool:
    """Is a sum of that shape a float32 tensor?"""
    return format == "fp32" or shape.numel() < LEAST_ELEMENTS


def empty_sum(
    format: SumFormat, shape: torch.Size, device: torch.device, staging: Staging | None, name: str
) -> Sum:
    """Zeros of a format and shape that are no tensor. staging: needed for host. name: the weight's.

    In host memory a weight has one sum at a time.
    """
    if format == "host":
        assert staging is not None
        return HostSum(name, shape, staging)
    return RoundedSum.zeros(shape, device) if format == "bf16" else CodedSum.zeros(shape, device)
