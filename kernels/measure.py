"""How long a piece of work takes on a device, and what the device could do."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable

import torch

_REPEATS = 9
_COPIED = 2**28  # bytes: more than a cache holds
_COPIED_ON_CPU = 2**27


def median_seconds(
    work: Callable[[], object], device: torch.device, repeats: int = _REPEATS
) -> float:
    """Of several runs after one to warm up. On a card by its own clock; on a CPU the time of all
    threads together, which other programs on the machine hardly change."""
    work()
    return statistics.median(_seconds(work, device) for _ in range(repeats))


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before the device's memory; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    name = "SC_LEVEL3_CACHE_SIZE"
    return max(0, os.sysconf(name)) if name in getattr(os, "sysconf_names", {}) else 0


def rotating(
    make: Callable[[], tuple[torch.Tensor, ...]], run: Callable[..., object], cache: int
) -> Callable[[], object]:
    """Work that runs on other arguments each time, so that none is in the cache any more.

    make: arguments. Of them there are so many that twice the cache lies between two uses.
    """
    first = make()
    bytes = sum(tensor.numel() * tensor.element_size() for tensor in first)
    more: Iterable[tuple[torch.Tensor, ...]] = (make() for _ in range(-(-2 * cache // bytes)))
    turns = itertools.cycle([first, *more])
    return lambda: run(*next(turns))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        work()
        return time.process_time() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy or addition, whichever moves more: on
    some CPUs a copy reads what it is about to overwrite, and that is not counted."""
    count = (_COPIED if device.type == "cuda" else _COPIED_ON_CPU) // 4
    source, target = (torch.ones(count, device=device) for _ in range(2))
    copied = 2 * 4 * count / median_seconds(lambda: target.copy_(source), device)
    added = 3 * 4 * count / median_seconds(lambda: target.add_(source), device)
    return max(copied, added)
