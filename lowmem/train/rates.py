"""What a device reaches: products of bf16 matrices and copies, by the clock."""

import time
from collections.abc import Callable

import torch

_REPEATS = 4  # of a timed call between two waits for the device, so that launches overlap


def measured_rates(
    device: str = "cuda", *, side: int = 4096, seconds: float = 1.0
) -> tuple[float, float]:
    """(Tflop/s of bf16 products of side x side matrices, GB/s of copies), `seconds` of each.

    The best of many repetitions, since other programs only ever slow one down.
    """
    dtype = torch.bfloat16
    left, right, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    product = _best(lambda: torch.mm(left, right, out=out), device, seconds)
    copy = _best(lambda: out.copy_(left), device, seconds)
    return 2 * side**3 / product / 1e12, 2 * left.nbytes / copy / 1e9


def _best(work: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of one call of `work`."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(_REPEATS):
            work()
        wait()
        best = min(best, (time.perf_counter() - started) / _REPEATS)
    return best
