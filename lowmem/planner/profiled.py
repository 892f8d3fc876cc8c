"""Bytes of CPU tensors from PyTorch's profiler: what the allocator did, not what a tracker saw.

    with Profiled() as record:
        with record.segment("update"):
            optimizer.step()
    record.segments["update"].peak

Independent of `LiveBytes`: it needs no dispatch mode and knows nothing of lowmem. The profiler
notes every allocation and release of the CPU allocator with its size, its time and the operators
that were running. Three rules make tensors of them:

* each allocation counts rounded up to 512 bytes, as the CUDA allocator would;
* what an operator takes and gives back before it returns is its own scratch memory and no tensor.
  An operator is the outermost one that is not merely composed of others (`aten::matmul` is): those
  inside it are how a CPU computes it;
* eight bytes outside every operator are a Python number on its way into one, on no device.
"""

import os
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lowmem.planner.live_bytes import GRANULE, Segment

_NUMBER_BYTES = 8
_MARK = "lowmem segment: "


class Profiled:
    """Record what happens inside `with`; afterwards `segments` has the bytes of each by name.

    Only tensors that were made inside count. events of the segments are empty.
    """

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell of its start on stderr
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "Profiled":
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        if exception[0] is None:
            self._read()

    def segment(self, name: str) -> record_function:
        """Name a stretch; segments do not nest. One that comes again keeps the higher peak."""
        return record_function(_MARK + name)

    def _read(self) -> None:
        recorded = self._profile.profiler
        assert recorded is not None
        assert recorded.kineto_results is not None
        events = _flattened(recorded.kineto_results.experimental_event_tree())
        steps = _steps(events)
        marks = [event for event in events if event.name.startswith(_MARK)]
        for mark in sorted(marks, key=lambda event: event.start_time_ns):
            name = mark.name.removeprefix(_MARK)
            peak, end = _within(steps, mark.start_time_ns, mark.end_time_ns)
            earlier = self.segments.get(name, Segment(0, 0, []))
            self.segments[name] = Segment(max(earlier.peak, peak), end, [])


def _flattened(roots: list[Any]) -> list[Any]:
    found, waiting = [], list(roots)
    while waiting:
        event = waiting.pop()
        found.append(event)
        waiting += event.children
    return found


def _steps(events: list[Any]) -> list[tuple[int, int]]:
    """(time, bytes by which live tensors change) in the order of time."""
    memory = [event for event in events if _is_allocation(event)]
    memory.sort(key=lambda event: event.start_time_ns)
    taken: dict[int, Any] = {}  # address -> its allocation
    steps: list[tuple[int, int]] = []
    for event in memory:
        allocation = event.typed[1]
        if allocation.alloc_size > 0:
            taken[allocation.ptr] = event
        elif allocation.ptr in taken:
            steps += _lived(taken.pop(allocation.ptr), event.start_time_ns)
    for event in taken.values():
        steps += _lived(event, None)
    return sorted(steps)


def _is_allocation(event: Any) -> bool:
    kind = torch._C._profiler._EventType.Allocation
    return event.tag == kind and event.typed[1].device.type == "cpu"


def _lived(event: Any, until: int | None) -> list[tuple[int, int]]:
    """The steps of an allocation: two, one if it is never given back, none if it is no tensor."""
    count, operator = event.typed[1].alloc_size, _operator(event)
    if operator is None and count == _NUMBER_BYTES:
        return []
    if operator is not None and until is not None and until <= operator.end_time_ns:
        return []
    size = -(-count // GRANULE) * GRANULE
    made = (event.start_time_ns, size)
    return [made] if until is None else [made, (until, -size)]


def _operator(event: Any) -> Any | None:
    """The outermost operator around an allocation that has a kernel of its own."""
    found, above = None, event.parent
    while above is not None:
        if above.name.startswith("aten::") and not _is_composed(above.name):
            found = above
        above = above.parent
    return found


@cache
def _is_composed(name: str) -> bool:
    """Is every overload of the operator that has a kernel merely a sequence of other operators?"""
    overloads = _overloads().get(name, ())
    return bool(overloads) and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(each, "CompositeImplicitAutograd")
        for each in overloads
    )


@cache
def _overloads() -> dict[str, list[str]]:
    """Operator -> full names of its overloads; a plain name stands alone, for it is what runs."""
    found: dict[str, list[str]] = {}
    for full in torch._C._dispatch_get_all_op_names():
        if torch._C._dispatch_has_kernel(full):
            found.setdefault(full.partition(".")[0], []).append(full)
    return {name: [name] if name in full else full for name, full in found.items()}


def _within(steps: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """(highest live bytes between two times, live bytes at the second)."""
    live = peak = 0
    for time, change in steps:
        if time > stop:
            break
        if time >= start:
            peak = max(peak, live)
        live += change
    return max(peak, live), live
