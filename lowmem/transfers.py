"""Tensors that live in host memory and come to the device for their use.

    transfers = Transfers(torch.device("cuda"))
    kept = transfers.host_like(tensor)      # pinned memory of its shape
    transfers.store(tensor, kept)           # to the host, behind the computation
    coming = transfers.fetch(kept)          # to the device, while something else is computed
    tensor = coming.arrived()               # from here on kernels may read it

    with transfers.beside() as mark:        # other work on what is in memory of the host
        ...
        done = mark()
    transfers.compute_waits(done)           # before the device's memory is used again

Copies in both directions run on one CUDA stream of their own, in the order of the calls: a fetch
sees what was stored before it. No call waits on the host but `wait`. Elsewhere than on CUDA the
same buffers are made and the copies are done at once, so bytes and traffic are counted anywhere.
Host memory appears in the phase HOST, and a rehearsal counts it apart from the device's.
"""

import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.errors import HardwareError
from lowmem.phases import phase
from lowmem.units import format_bytes

HOST = "host"
Mark = torch.cuda.Event | None  # where there is but one queue there is nothing to mark
_PAGE = mmap.PAGESIZE


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised host memory, pinned if the device is a card; on meta without memory.

    Whole pages, so that exactly these are pinned: PyTorch's own pinned memory is rounded up to a
    power of two. To pin takes time, and to let go waits for the device: keep it for the run. Any
    thread may ask; the phase HOST is the caller's to open, for phases are those of the training.
    """
    count = torch.Size(shape).numel() * dtype.itemsize
    pages = max(1, -(-count // _PAGE)) * _PAGE
    where = "meta" if device.type == "meta" else "cpu"
    memory = torch.empty(pages + _PAGE, dtype=torch.uint8, device=where)
    start = -memory.data_ptr() % _PAGE
    if device.type == "cuda":
        _pin(memory, start, pages)
    return memory[start : start + count].view(dtype).view(shape)


@dataclass
class Coming:
    """A tensor on its way to the device."""

    _tensor: Tensor
    _mark: Mark = None

    def arrived(self) -> Tensor:
        """The tensor, for kernels that are launched from here on."""
        if self._mark is not None:
            torch.cuda.current_stream(self._tensor.device).wait_event(self._mark)
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
        """`host_memory` of that shape and dtype."""
        return self.host(tuple(tensor.shape), tensor.dtype)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`host_memory` for this device, in the phase HOST."""
        with phase(HOST):
            return host_memory(shape, dtype, self.device)

    def fetch(self, host: Tensor) -> Coming:
        """Begin to copy it to the device."""
        here = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self.fetched += host.nbytes
        with self.beside() as mark:
            here.copy_(host, non_blocking=True)
            return Coming(here, mark())

    def store(self, tensor: Tensor, host: Tensor) -> None:
        """Begin to copy it to the host; nobody may change it any more.

        It stays in memory until the next `store` or `settle`: where the copy is as quick as the
        computation, nothing waits.
        """
        self.settle()
        self.stored += host.nbytes
        with self.beside() as mark:
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
    def beside(self) -> Iterator[Callable[[], Mark]]:
        """On CUDA, inside is the stream of copies, after all kernels so far: they may still use
        the memory that is written. Yields what marks the end of the work so far."""
        if self.device.type != "cuda":
            yield lambda: None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield self._stream.record_event

    def compute_waits(self, mark: Mark) -> None:
        """What is computed from now on begins only when that point has been reached."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


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

    def unpin() -> None:
        torch.cuda.synchronize()  # a copy may still be on its way
        cudart.cudaHostUnregister(address)

    weakref.finalize(memory.untyped_storage(), unpin).atexit = False  # then the system does it
