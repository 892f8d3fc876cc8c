"""Bytes that a stretch of a run really used, on the CPU and on CUDA.

    with meter_of(device) as meter:
        with meter.segment("update"):
            optimizer.step()
    meter.readings["update"].allocated

The CPU's meter is the profiler (planner/profiled.py), CUDA's is its caching allocator.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lowmem.planner.live_bytes import Segment
from lowmem.planner.profiled import Profiled


@dataclass(frozen=True)
class Reading:
    """The highest bytes of a stretch, None where the device has no such number.

    end: live bytes at its end, of tensors on the CPU, allocated on CUDA.
    """

    tensors: int | None
    allocated: int | None
    reserved: int | None
    end: int

    @property
    def highest(self) -> int:
        """Of tensors, or where those are not known of what is allocated."""
        return self.tensors if self.tensors is not None else self.allocated or 0

    def then(self, later: "Reading") -> "Reading":
        """Both stretches as one."""
        return Reading(
            _higher(self.tensors, later.tensors),
            _higher(self.allocated, later.allocated),
            _higher(self.reserved, later.reserved),
            later.end,
        )


def _higher(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)


class Meter(Protocol):
    """readings: by segment, complete when the meter is closed."""

    @property
    def readings(self) -> dict[str, Reading]: ...
    def segment(self, name: str) -> AbstractContextManager[Any]: ...
    def __enter__(self) -> "Meter": ...
    def __exit__(self, *exception: Any) -> None: ...


def meter_of(device: str) -> Meter:
    return CudaMeter() if device == "cuda" else CpuMeter()


class CpuMeter(Profiled):
    @property
    def readings(self) -> dict[str, Reading]:
        return {name: _of_tensors(segment) for name, segment in self.segments.items()}

    def __enter__(self) -> "CpuMeter":
        super().__enter__()
        return self


def _of_tensors(segment: Segment) -> Reading:
    return Reading(segment.peak, None, None, segment.end)


class CudaMeter:
    """Of a segment that comes again the higher peaks are kept, and the last end."""

    def __init__(self) -> None:
        self.readings: dict[str, Reading] = {}

    def __enter__(self) -> "CudaMeter":
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found = Reading(None, allocated, reserved, torch.cuda.memory_allocated())
        self.readings[name] = self.readings[name].then(found) if name in self.readings else found
