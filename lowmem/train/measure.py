"""How much memory a run really uses, and how far that is from the plan."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.plan import Plan
from lowmem.planner.rehearse import LiveBytes, track_persistent
from lowmem.train.events import Measured, Report


@contextmanager
def measured_peak(
    model: Llama, optimizer: Optimizer, plan: Plan | None, report: Report
) -> Iterator[None]:
    """Report the peak of what happens inside next to the plan's; without a plan, do nothing.

    On CUDA it is what the allocator reserved; on the CPU the bytes of live tensors, counted by the
    tracker that also rehearses.
    """
    if plan is None:
        yield
        return
    device = model.head_weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        report(Measured("reserved", plan.memory.reserved, torch.cuda.max_memory_reserved(device)))
        return
    tracker = LiveBytes(device.type)
    track_persistent(tracker, optimizer)
    with tracker:
        yield
    report(Measured("tensors", plan.memory.tensors, tracker.peak))


def memory_bytes(device: torch.device) -> int:
    """Peak so far: of the allocator on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
