"""What fits on 8, 12, 16 and 24 GB: docs/what_fits.md, and its first table in the README.

    python tests/benchmarks/what_fits.py            # minutes on 2 cores
    python tests/benchmarks/what_fits.py --print    # leaves both files alone

Peaks are the planner's own (planner/job.py), and the plans its search's; nothing is run on a card.
"""

import argparse
import os
import shlex
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # `python tests/benchmarks/...` from a clone
    sys.path.insert(0, str(ROOT))

from lowmem import __version__  # noqa: E402
from lowmem.cli.settings import planned as plan_of  # noqa: E402
from lowmem.config.defaults import rows_of  # noqa: E402
from lowmem.config.flags import FLAGS  # noqa: E402
from lowmem.config.load import load  # noqa: E402
from lowmem.config.presets import read_preset  # noqa: E402
from lowmem.config.schema import Config, UpdateMode, WeightFormat  # noqa: E402
from lowmem.planner.hardware import find_card  # noqa: E402
from lowmem.planner.job import Job  # noqa: E402
from lowmem.planner.plan import Choice, Plan  # noqa: E402
from lowmem.units import MIB  # noqa: E402

TARGET = ROOT / "docs" / "what_fits.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by tests/benchmarks/what_fits.py -->", "<!-- until here -->"
CARDS = ("8GB", "12GB", "16GB", "24GB")
LENGTH = 2048
MOST_SEQUENCES = 128
TRUE_BATCH = 131_072  # tokens
RANK_STEP = 64


@dataclass(frozen=True)
class Row:
    """A configuration of which the largest micro-batch is asked; rank None: the method has none."""

    size: str
    weights: WeightFormat
    method: str
    rank: int | None = None
    states: str = "8bit"


ROWS = [
    Row("7b", "bf16", "apollo_mini", 1),
    Row("7b", "bf16", "apollo", 512),
    Row("7b", "bf16", "galore", 1024),
    Row("7b", "bf16", "fira", 1024),
    Row("7b", "bf16", "adam8bit"),
    Row("7b", "int8", "adam8bit"),
    Row("7b", "int8", "galore", 1024),
    Row("7b", "int8", "fira", 1024),
    Row("7b", "int8", "apollo", 1024),
    Row("7b", "int8", "apollo_mini", 1),
    Row("13b", "int8", "apollo", 1280),
    Row("13b", "int8", "apollo_mini", 1),
    Row("3b", "bf16", "adam8bit"),
    Row("1b", "bf16", "adam8bit"),
]
"""All with 8-bit moments, embedding, head and norms included."""

SUMMED: list[tuple[str, str, WeightFormat]] = [
    ("7b", "24GB", "bf16"),
    ("7b", "24GB", "int8"),
    ("7b", "16GB", "int8"),
    ("7b", "12GB", "int8"),
    ("13b", "24GB", "int8"),
]

PLANS = [
    (size, gpu, length)
    for size, gpus in (("7b", CARDS[::-1]), ("13b", ("24GB", "16GB")))
    for gpu in gpus
    for length in (256, 1024)
]


@cache
def job(size: str, gpu: str) -> Job:
    config = Config.model_validate({"train": {"device": "cuda"}})
    return Job(config, find_card(gpu, "cuda"), read_preset(f"llama-{size}"), 2**20, LENGTH, "flash")


def choice(row: Row, mode: UpdateMode, sequences: int, micro_batches: int) -> Choice:
    return Choice(
        row.method,
        row.rank,
        row.states,
        row.weights,
        mode,
        "full",
        sequences,
        micro_batches,
        None,
    )


def most_sequences(row: Row, gpu: str) -> int:
    """The largest micro-batch of LENGTH that fits, fused and recomputed in full; 0 where none."""
    at = job(row.size, gpu)

    def needed(sequences: int) -> int:
        return at.peak(choice(row, "fused", sequences, 1))

    return bisect_right(range(1, MOST_SEQUENCES + 1), at.card.usable_bytes, key=needed)


def largest_rank(size: str, gpu: str, weights: WeightFormat) -> int:
    """Of GaLore with sums of projections, in steps; 0 where none fits."""
    at = job(size, gpu)

    def needed(rank: int) -> int:
        row = Row(size, weights, "galore", rank)
        return at.peak(choice(row, "fused+subspace", 1, 2))

    ranks = range(RANK_STEP, at.model.hidden_size + 1, RANK_STEP)
    fitting = bisect_right(ranks, at.card.usable_bytes, key=needed)
    return ranks[fitting - 1] if fitting else 0


def command(row: Row, gpu: str, mode: str, batch: int, micro: int) -> str:
    words = ["lowmem", "plan", "--model", f"llama-{row.size}", "--gpu", gpu]
    words += ["--method", row.method, "--weights", row.weights, "--seq-len", str(LENGTH)]
    words += ["--rank", str(row.rank)] if row.rank is not None else []
    words += ["--states", row.states] if row.method != "adam8bit" else []
    words += ["--update", mode, "--recompute", "full"]
    return shlex.join([*words, "--batch", f"{batch}seq", "--micro-batch", str(micro)])


def fitting_row(row: Row) -> tuple[str, str]:
    """(line of the table, command of its smallest card)."""
    found = {gpu: most_sequences(row, gpu) for gpu in CARDS}
    one = job(row.size, "24GB").tensors(choice(row, "fused", 1, 1))
    rank = "-" if row.rank is None else row.rank
    cells = " / ".join(str(count or "-") for count in found.values())
    line = (
        f"| {row.size} | {row.weights} | {row.method} | {rank} | {row.states} | {LENGTH:,} | "
        f"{one / MIB:,.0f} | {cells} |"
    )
    smallest = next((gpu for gpu in CARDS if found[gpu]), None)
    if smallest is None:
        return line, ""
    return line, command(row, smallest, "fused", found[smallest], found[smallest])


def summed_row(size: str, gpu: str, weights: WeightFormat) -> tuple[str, str]:
    rank = largest_rank(size, gpu, weights)
    if not rank:
        return f"| {size} | {gpu} | {weights} | none | - | - |", ""
    row = Row(size, weights, "galore", rank)
    peak = job(size, gpu).tensors(choice(row, "fused+subspace", 1, 2))
    line = f"| {size} | {gpu} | {weights} | {rank} | any | {peak / MIB:,.0f} |"
    return line, command(row, gpu, "fused+subspace", TRUE_BATCH // LENGTH, 1)


def planned(words: list[str]) -> Plan:
    """The plan of these flags, as the command makes it."""
    pairs = zip(words[::2], words[1::2], strict=True)
    flags = {FLAGS[flag]: value for flag, value in pairs}
    return plan_of(load(flags, [], {}, []).config, for_this_machine=False)


def plan_row(size: str, gpu: str, length: int) -> tuple[str, str]:
    """A batch of TRUE_BATCH tokens, else what the planner takes, else without a desktop."""
    common = ["--model", f"llama-{size}", "--gpu", gpu, "--seq-len", str(length)]
    for more in (["--batch", f"{TRUE_BATCH // length}seq"], [], ["--others", "0MiB"]):
        words = [*common, *more]
        plan = planned(words)
        if plan.fits:
            break
    made = plan.choice
    tokens = rows_of(plan.config.train.batch, length) * length
    if not plan.fits:
        short = (plan.memory.reserved - plan.card.usable_bytes) / MIB
        return f"| {size} | {gpu} | {length:,} | nothing fits: {short:,.0f} MiB short |", ""
    line = (
        f"| {size} | {gpu} | {length:,} | {tokens:,} | {made.method} | {made.rank or '-'} | "
        f"{made.states} | {made.weights} | {made.update} | "
        f"{made.micro_batch} x {made.accumulate} | {made.sums if made.accumulate > 1 else '-'} | "
        f"{plan.memory.tensors / MIB:,.0f} | {plan.memory.reserved / MIB:,.0f} | "
        f"{f'{plan.memory.host / MIB:,.0f}' if plan.memory.host else '-'} |"
    )
    return line, shlex.join(["lowmem", "plan", *words])


def table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    names = [name.strip() for name in title.strip("|").split("|")]
    yield title
    yield "|" + "---|" * len(names)
    found = list(rows)
    yield from (line for line, _ in found)
    yield "\n```sh"
    yield from (typed for _, typed in found if typed)
    yield "```\n"


def page(pool: ProcessPoolExecutor, plans: list[str]) -> Iterator[str]:
    fitting = pool.map(fitting_row, ROWS)
    summed = pool.map(summed_row, *zip(*SUMMED, strict=True))
    yield f"""# What fits

`python tests/benchmarks/what_fits.py` makes this page (lowmem {__version__}). All of it is
**rehearsed only**: nothing was measured on a card. Bytes of tensors are exact as far as a CPU can
show; what the card's allocator, context and libraries take are presets (`memory.md`). A card of a
class has what its driver reports, less context, desktop and margin. Peaks are MiB of tensors,
cuBLAS workspaces included; `host` is page-locked memory of the machine, MiB too.

## What lowmem plans by itself

{TRUE_BATCH:,} tokens per update were asked for; where that does not fit, nothing was, and the
planner takes a smaller batch; where that does not fit either, the card drives no desktop. The
commands below print these plans.
"""
    yield from plans
    yield f"""## The largest micro-batch

One micro-batch per update (`fused`), recomputation `full`, sequences of {LENGTH:,}. The peak is
that of one sequence; then the largest number of sequences on 8 / 12 / 16 / 24 GB.
"""
    yield from table(
        "| model | weights | method | rank | states | tokens | peak | largest micro-batch |",
        fitting,
    )
    yield f"""## True batches

GaLore with 8-bit moments and sums in the subspace (`fused+subspace`, float32): any number of
micro-batches of 1 x {LENGTH:,} tokens; the largest rank that fits, in steps of {RANK_STEP}.
"""
    yield from table("| model | card | weights | rank | micro-batches | peak |", summed)


def plan_table(pool: ProcessPoolExecutor) -> list[str]:
    title = (
        "| model | card | sequence | tokens per update | method | rank | states | weights "
        "| update | micro-batch | sums | tensors | reserved | host |"
    )
    return list(table(title, pool.map(plan_row, *zip(*PLANS, strict=True))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave the files alone")
    given = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        plans = plan_table(pool)
        text = "\n".join(page(pool, plans)).rstrip() + "\n"
    if given.print:
        print(text)
        return
    TARGET.write_text(text, encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    rows = "\n".join(line for line in plans if line.startswith("|"))
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{rows}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
