"""Head and cross-entropy: ours beside PyTorch's, in time, memory and error, on one CPU thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/cross_entropy.py

Each does the whole work: the loss, the gradient of x, the gradient of W. Times are CPU seconds,
medians of runs that take turns. Memory is the peak over what was there before, as PyTorch's own
profiler records it; of ours a second figure is without dW, for the optimizer can take it by rows.
Errors are relative, in the norm, against float64.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions, functional

from lowmem.kernels.linear_cross_entropy import cross_entropy, cross_entropy_backward
from lowmem.kernels.vector_math import settle_vector_math
from lowmem.planner.profiled import Profiled

SHAPES = [(2048, 128, 8192), (4096, 512, 32000)]  # tokens, hidden size, vocabulary
REPEATS = 5
Made = tuple[Tensor, Tensor, Tensor]
Work = Callable[[Tensor, Tensor, Tensor], Made]


def ours(keep: bool, whole: bool = True) -> Work:
    """whole: collect dW, as PyTorch does; otherwise its rows are dropped as they come."""

    def work(x: Tensor, weight: Tensor, targets: Tensor) -> Made:
        grad = torch.empty_like(weight) if whole else weight

        def take(start: int, rows: Tensor) -> None:
            if whole:
                grad[start : start + len(rows)] = rows

        scale = 1 / len(x)
        loss, softmax = cross_entropy(x, weight, targets, scale, keep_logits=keep)
        return loss, cross_entropy_backward(x, weight, targets, scale, softmax, take), grad

    return work


def torchs(options: LinearCrossEntropyOptions | None) -> Work:
    def work(x: Tensor, weight: Tensor, targets: Tensor) -> Made:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = functional.linear_cross_entropy(x, weight, targets, options=options)
        loss.backward()
        assert x.grad is not None
        assert weight.grad is not None
        return loss.detach(), x.grad, weight.grad

    return work


WORKS: dict[str, Work] = {
    "ours, logits kept": ours(True),
    "ours, logits made again": ours(False),
    "ours, made again, dW taken by rows": ours(False, whole=False),
    "torch, options=None": torchs(None),
    "torch, chunked (auto)": torchs(LinearCrossEntropyOptions()),
    "torch, chunked (compact)": torchs(LinearCrossEntropyOptions(acc_policy="compact")),
}


def example(tokens: int, hidden: int, vocabulary: int) -> Made:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) * 0.05
    return x, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    settle_vector_math()
    print("| tokens x hidden x vocabulary | dtype | | CPU time | peak | error of dx | of dW |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, targets = example(*shape)
            x, weight = x.to(dtype), weight.to(dtype)
            exact = torchs(None)(x.double(), weight.double(), targets)
            times: dict[str, list[float]] = {name: [] for name in WORKS}
            for _ in range(REPEATS):
                for name, work in WORKS.items():
                    began = time.process_time()
                    work(x, weight, targets)
                    times[name].append(time.process_time() - began)
            for name, work in WORKS.items():
                with Profiled() as record, record.segment("work"):
                    _, grad_x, grad_weight = work(x, weight, targets)
                mib = record.segments["work"].peak / 2**20
                what = (
                    f"{' x '.join(map(str, shape))} | {str(dtype).removeprefix('torch.')} | {name}"
                )
                of_weight = "-" if grad_weight is weight else f"{error(grad_weight, exact[2]):.1e}"
                print(
                    f"| {what} | {statistics.median(times[name]) * 1e3:.0f} ms | {mib:.0f} MiB "
                    f"| {error(grad_x, exact[1]):.1e} | {of_weight} |"
                )


if __name__ == "__main__":
    main()
