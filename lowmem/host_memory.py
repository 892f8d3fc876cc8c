"""Memory of the host beside that of a card, and copies between them while the card computes.

    room = pinned_like(gradient)
    with stream.after_compute():            # does not hold up what is computed next
        room.copy_(gradient, non_blocking=True)
    copied = stream.mark()
    stream.compute_waits(copied)            # before the gradient's memory is used again

Nothing here waits on the host. On a CPU everything happens at once, in order. On meta, host memory
is a meta tensor that appears in the phase HOST, and a rehearsal counts it apart from the card's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowmem.phases import phase

HOST = "host"
Mark = torch.cuda.Event | None  # where there is but one queue there is nothing to mark


def pinned_like(tensor: Tensor, device_type: str | None = None) -> Tensor:
    """Uninitialised host memory of that shape and dtype, page-locked if the tensor is on a card.

    device_type: of the card that a tensor on meta stands for. PyTorch rounds page-locked memory up
    to a power of two.
    """
    if tensor.is_meta:
        if device_type == "cpu":  # the same memory as everything else
            return torch.empty_like(tensor)
        with phase(HOST):
            return torch.empty_like(tensor)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


class SideStream:
    """A second queue of work on a card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        """Work inside is queued here, behind everything that was queued for computing before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """A point behind everything that was queued here so far."""
        return None if self._stream is None else self._stream.record_event()

    def compute_waits(self, mark: Mark) -> None:
        """What is computed from now on begins only when that point has been reached."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
