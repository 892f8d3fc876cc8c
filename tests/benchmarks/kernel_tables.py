"""The tables of docs/kernels.md: `lowmem bench optimizer` and `lowmem bench kernels` as Markdown.

    python tests/benchmarks/kernel_tables.py --threads 1

Memory stays with the processes, as it does in a training run: without that, the system takes
temporaries back and clears them anew. Needs the packages of the extra `dev` for the rows of others.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTLED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
Row = dict[str, Any]


def bench(what: str, threads: int) -> Row:
    """What `lowmem bench` says."""
    command = [sys.executable, "-m", "lowmem", "bench", what, "--json"]
    own = os.environ | SETTLED | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: Row = json.loads(done.stdout)
    return found


def table(columns: list[str], rows: list[list[str]]) -> None:
    lines = [columns, ["---"] * len(columns), *rows]
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n", end="\n\n")


def step_cells(row: Row) -> list[str]:
    if row["missing"]:
        return [row["optimizer"], row["missing"], *[""] * 4]
    of_peer = "" if row["of_peer"] is None else f"{row['of_peer']:.2f}"
    times = [f"{1e3 * row['seconds']:.1f} ms", f"{row['ratio']:.2f}", of_peer]
    return [row["optimizer"], *times, f"{row['bytes'] / 2**20:.0f} MiB", f"{row['of_a_copy']:.0%}"]


def kernel_cells(row: Row, bandwidth: float) -> list[str]:
    times = [f"{1e3 * row[key]:.2f} ms" for key in ("seconds", "reference_seconds")]
    share = f"{row['bytes'] / row['seconds'] / bandwidth:.0%}"
    moved = f"{row['bytes'] / 2**20:.0f} MiB"
    return [f"`{row['operator']}`", row["implementation"], *times, moved, share]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{names[0] if names else platform.processor()}, load {load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    print(f"{machine()}, {threads} threads\n")
    steps = bench("optimizer", threads)
    columns = ["optimizer", "step", "x fused AdamW", "x package", "bytes", "of a copy"]
    table(columns, [step_cells(row) for row in steps["steps"]])
    kernels = bench("kernels", threads)
    print(f"A copy or an addition moved {kernels['copy'] / 2**30:.1f} GiB/s.\n")
    columns = ["kernel", "runs in", "time", "reference", "bytes", "of that bandwidth"]
    table(columns, [kernel_cells(row, kernels["copy"]) for row in kernels["kernels"]])


if __name__ == "__main__":
    main()
