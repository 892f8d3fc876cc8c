"""Tensors that live in host memory and come to the device for their use.

    transfers = Transfers(torch.device("cuda"))
    kept = transfers.host_like(tensor)      # pinned memory of its shape
    transfers.store(tensor, kept)           # to the host, behind the computation
    coming = transfers.fetch(kept)          # to the device, while something else is computed
    tensor = coming.arrived()               # from here on kernels may read it

Copies in both directions run on one CUDA stream of their own, in the order of the calls: a fetch
sees what was stored before it. No call waits on the host but `wait`. Elsewhere than on CUDA the
same buffers are made and the copies are done at once, so bytes and traffic are counted anywhere.
"""

import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.errors import HardwareError
from lowmem.host_memory import HOST
from lowmem.phases import phase
from lowmem.units import format_bytes

_PAGE = mmap.PAGESIZE


@dataclass
class Coming:
    """A tensor on its way to the device."""

    _tensor: Tensor
    _event: torch.cuda.Event | None = None

    def arrived(self) -> Tensor:
        """The tensor, for kernels that are launched from here on."""
        if self._event is not None:
            torch.cuda.current_stream(self._tensor.device).wait_event(self._event)
        return self._tensor


@dataclass
class Transfers:
    """Copies between a device and host memory.

    fetched, stored: bytes that went to the device and to the host so far.
    """

    device: torch.device
    fetched: int = 0
    stored: int = 0
    _leaving: list[Coming] = field(default_factory=list)
    _stream: torch.cuda.Stream | None = None

    def host_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised host memory of that shape and dtype; pinned where the device is a card."""
        return self.host(tuple(tensor.shape), tensor.dtype)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Whole pages, so that exactly these are pinned: PyTorch's own pinned memory is rounded
        up to a power of two."""
        count = torch.Size(shape).numel() * dtype.itemsize
        pages = max(1, -(-count // _PAGE)) * _PAGE
        where = "meta" if self.device.type == "meta" else "cpu"
        with phase(HOST):
            memory = torch.empty(pages + _PAGE, dtype=torch.uint8, device=where)
        start = -memory.data_ptr() % _PAGE
        if self.device.type == "cuda":
            _pin(memory, start, pages)
        return memory[start : start + count].view(dtype).view(shape)

    def fetch(self, host: Tensor) -> Coming:
        """Begin to copy it to the device."""
        here = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self.fetched += host.nbytes
        with self._beside() as mark:
            here.copy_(host, non_blocking=True)
            return Coming(here, mark())

    def store(self, tensor: Tensor, host: Tensor) -> None:
        """Begin to copy it to the host; nobody may change it any more.

        It stays in memory until the next `store` or `settle`: where the copy is as quick as the
        computation, nothing waits.
        """
        self.settle()
        self.stored += host.nbytes
        with self._beside() as mark:
            host.copy_(tensor, non_blocking=True)
            self._leaving.append(Coming(tensor, mark()))

    def settle(self) -> None:
        """Let go of what is leaving: its memory is free for kernels that come after the copy."""
        for leaving in self._leaving:
            leaving.arrived()
        self._leaving.clear()

    def wait(self) -> None:
        """Wait until the host may read what was stored."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def _beside(self) -> Iterator[Callable[[], torch.cuda.Event | None]]:
        """On CUDA, inside is the stream of copies, after all kernels so far: they may still use
        the memory that the copy writes. Yields what marks the end of a copy."""
        if self.device.type != "cuda":
            yield lambda: None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield self._stream.record_event


def _pin(memory: Tensor, start: int, size: int) -> None:
    """Lock these bytes in host memory, until the memory is freed."""
    address, cudart = memory.data_ptr() + start, torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(address, size, 0))
    if code != 0:
        raise HardwareError(
            f"{format_bytes(size)} of host memory cannot be pinned (CUDA error {code})",
            "the system has too little memory, or limits what a program may lock",
            "a smaller --batch, or a machine with more memory; `ulimit -l` shows the limit",
        )
    weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, address)
