"""CPU time of choosing a basis, beside `torch.linalg.svd` on the same matrix.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 python tests/benchmarks/refresh.py

One thread, process CPU time, median of 11 (SVD: 3). The matrix has singular values i^-0.6, and the
warm start is the basis of the same matrix under noise of 0.3 of its standard deviation. Energy is
what the basis captures, relative to the best one of that rank.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.optim.bases import Solver, leading_basis

SHAPES = ((512, 1376), (1024, 2736), (2048, 2048))
PUBLISHED, AIM = "torch.linalg.svd", 40.0


def gradient(m: int, n: int) -> tuple[Tensor, Tensor]:
    """(the matrix, the matrix under noise)."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
    full = (u * torch.arange(1, min(m, n) + 1).float().pow(-0.6)) @ v
    return full, full + 0.3 * full.std() * torch.randn(m, n, generator=generator)


def milliseconds(work: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(1e3 * (time.process_time() - began))
    return statistics.median(found)


def main() -> None:
    torch.set_num_threads(1)
    print("| shape | rank | solver | ms | times faster | energy |")
    print("|---|---|---|---|---|---|")
    for m, n in SHAPES:
        full, noisy = gradient(m, n)
        rank = m // 4
        old = leading_basis(noisy, False, rank, "eigh", None, 0)[0].float()
        best = torch.linalg.svdvals(full)[:rank].square().sum()
        peer = milliseconds(lambda full=full: torch.linalg.svd(full, full_matrices=False), 3)  # type: ignore[misc]
        print(f"| {m}x{n} | {rank} | {PUBLISHED} | {peer:.1f} | 1 | 1 |")
        rows: tuple[tuple[str, Solver, Tensor | None], ...] = (
            ("eigh", "eigh", None),
            ("iteration, cold", "iteration", None),
            ("iteration, warm", "iteration", old),
        )
        for name, solver, start in rows:

            def work(solver: Solver = solver, start: Tensor | None = start) -> Tensor:
                return leading_basis(full, False, rank, solver, start, 0)[0]  # noqa: B023

            work()
            spent = milliseconds(work, 11)
            energy = (work().float().T @ full).square().sum() / best
            print(
                f"| {m}x{n} | {rank} | {name} | {spent:.1f} | {peer / spent:.1f} | {energy:.4f} |"
            )


if __name__ == "__main__":
    main()
