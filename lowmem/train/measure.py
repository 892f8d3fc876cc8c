"""How much memory a run really uses, and how far that is from the plan."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.live_bytes import PERSISTENT, LiveBytes
from lowmem.planner.persistent import bytes_by_part, persistent_tensors, track_persistent
from lowmem.planner.plan import Plan
from lowmem.train.events import Measured, Part, Report


@contextmanager
def measured_peak(
    model: Llama, optimizer: Optimizer, plan: Plan | None, report: Report
) -> Iterator[None]:
    """Report the peak of what happens inside next to the plan's; without a plan, do nothing.

    On CUDA it is what the allocator reserved; on the CPU the bytes of live tensors, counted by the
    tracker that also rehearses. By category: see `categories`.
    """
    if plan is None:
        yield
        return
    device = model.head_weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        parts = categories(plan, model, optimizer, torch.cuda.max_memory_allocated(device))
        reserved = torch.cuda.max_memory_reserved(device)
        report(Measured("reserved", plan.memory.reserved, reserved, parts))
        return
    tracker = LiveBytes(device.type)
    track_persistent(tracker, optimizer)
    with tracker:
        yield
    parts = categories(plan, model, optimizer, tracker.peak)
    report(Measured("tensors", plan.memory.tensors, tracker.peak, parts))


def categories(plan: Plan, model: Llama, optimizer: Optimizer, peak: int | None) -> list[Part]:
    """What persists, exactly, and everything else as what it leaves of the peak.

    peak: measured, of tensors on the CPU and allocated on CUDA; None: not measured.
    """
    planned, measured = plan.memory.parts, bytes_by_part(persistent_tensors(optimizer))
    on_cuda = model.head_weight.device.type == "cuda"
    whole = plan.memory.allocated if on_cuda else plan.memory.tensors
    parts = [
        Part(name, planned.get(name, 0), measured.get(name, 0))
        for name in PERSISTENT
        if planned.get(name) or measured.get(name)
    ]
    rest = whole - sum(part.planned for part in parts)
    left = None if peak is None else peak - sum(measured.values())
    return [*parts, Part("all else at the peak", rest, left)]


def memory_bytes(device: torch.device) -> int:
    """Peak so far: of the allocator on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
