"""What fits on 8, 12, 16 and 24 GB: docs/what_fits.md, and its first table in the README.

    python tests/benchmarks/what_fits.py            # about half an hour on 2 cores
    python tests/benchmarks/what_fits.py --print    # leaves both files alone

Peaks are the planner's own (planner/job.py), and the plans its search's; nothing is run on a card.
Plans that were made before come from the cache, so a second call goes on where the first was cut.
"""

import argparse
import os
import shlex
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
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
from lowmem.config.schema import Config, Ends, SumFormat, UpdateMode, WeightFormat  # noqa: E402
from lowmem.planner.hardware import find_card  # noqa: E402
from lowmem.planner.job import Job  # noqa: E402
from lowmem.planner.live_bytes import PARTS  # noqa: E402
from lowmem.planner.plan import Choice, Memory, Plan  # noqa: E402
from lowmem.units import MIB  # noqa: E402

TARGET = ROOT / "docs" / "what_fits.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by tests/benchmarks/what_fits.py -->", "<!-- until here -->"
CARDS = ("8GB", "12GB", "16GB", "24GB")
LENGTH = 2048
MOST_SEQUENCES = 128
TRUE_BATCH = 131_072  # tokens
RANK_STEP = 64
BARE = 581 * MIB  # what the aims leave: context, cuBLAS and pages; no desktop and no margin
Aims = tuple[int, int, int, int]


@dataclass(frozen=True)
class Row:
    """A configuration of which the largest micro-batch is asked; rank None: the method has none.

    aim: MiB of one sequence, without cuBLAS. aims: the largest micro-batch on each of CARDS.
    """

    size: str
    weights: WeightFormat
    method: str
    rank: int | None = None
    aim: int = 0
    aims: Aims = (0, 0, 0, 0)
    ends: Ends = "exact"
    states: str = "8bit"


ROWS = [
    Row("7b", "bf16", "apollo_mini", 1, 14_199, (0, 0, 3, 14)),
    Row("7b", "bf16", "apollo", 512, 15_768, (0, 0, 1, 12)),
    Row("7b", "bf16", "galore", 1024, 19_158, (0, 0, 0, 7)),
    Row("7b", "bf16", "fira", 1024, 19_158, (0, 0, 0, 7)),
    Row("7b", "bf16", "adam8bit", None, 26_730),
    Row("7b", "int8", "adam8bit", None, 20_779, (0, 0, 0, 5)),
    Row("7b", "int8", "galore", 1024, 13_175, (0, 0, 4, 15)),
    Row("7b", "int8", "fira", 1024, 13_175, (0, 0, 4, 15)),
    Row("7b", "int8", "apollo", 1024, 11_370, (0, 1, 7, 18)),
    Row("7b", "int8", "apollo_mini", 1, 8_248, (0, 5, 11, 22)),
    Row("7b", "int8", "apollo_mini", 1, 8_006, (0, 6, 11, 22), "int8"),
    Row("13b", "int8", "apollo", 1280, 21_149, (0, 0, 0, 3)),
    Row("13b", "int8", "apollo_mini", 1, 15_011, (0, 0, 1, 9)),
    Row("13b", "int8", "apollo_mini", 1, 14_708, (0, 0, 2, 9), "int8"),
    Row("3b", "bf16", "adam8bit", None, 10_821, (0, 2, 11, 29)),
    Row("1b", "bf16", "adam8bit", None, 5_475, (8, 21, 34, 61)),
]
"""All with 8-bit moments, embedding, head and norms included."""

SUMMED: list[tuple[str, str, WeightFormat, int]] = [
    ("7b", "24GB", "bf16", 768),
    ("7b", "24GB", "int8", 1024),
    ("7b", "16GB", "int8", 576),
    ("7b", "12GB", "int8", 192),
    ("13b", "24GB", "int8", 448),
]
"""The last is the rank aimed at."""

PUBLISHED: list[tuple[str, Row, int, float, float]] = [
    ("GaLore, 8-bit", Row("7b", "bf16", "galore", 1024), 16, 22.02, 20.9),
    ("Q-GaLore", Row("7b", "int8", "q_galore", 1024), 16, 15.26, 14.6),
    ("Q-APOLLO-Mini", Row("7b", "int8", "apollo_mini", 1), 1, 11.0, 7.97),
    ("Q-APOLLO-Mini, ends int8", Row("7b", "int8", "apollo_mini", 1, ends="int8"), 1, 11.0, 7.72),
]
"""Whose peak, its settings, micro-batch of 256 tokens each, and GB: published and aimed at."""

Asked = tuple[str, str, int, tuple[str, ...]]
"""Model, card, sequence length and other flags."""


def asked(*cases: tuple[str, str, str], lengths: tuple[int, ...] = (1024,)) -> list[Asked]:
    """(model, card, flags) with these sequence lengths."""
    return [
        (size, gpu, length, tuple(flags.split()))
        for size, gpu, flags in cases
        for length in lengths
    ]


PLANS = asked(
    ("7b", "24GB", ""),
    ("7b", "24GB", "--weights bf16"),
    ("7b", "16GB", ""),
    ("7b", "16GB", "--weights bf16"),
    ("7b", "12GB", ""),
    ("7b", "8GB", ""),
    ("13b", "24GB", ""),
    ("13b", "16GB", ""),
    lengths=(256, 1024),
)

SUMS: tuple[SumFormat, ...] = ("fp32", "bf16", "int8", "host")
LEAST_RANK = 128  # of GaLore, an eighth of its sheet's; with less the sums take fewer bytes instead

CASES: list[tuple[str, str, WeightFormat]] = [
    ("7b", "24GB", "bf16"),
    ("7b", "16GB", "bf16"),
    ("7b", "16GB", "int8"),
    ("7b", "12GB", "int8"),
    ("13b", "24GB", "int8"),
    ("13b", "16GB", "int8"),
]

NAMED: list[tuple[Row, str]] = [
    (Row(size, weights, method, rank), gpu)
    for size, gpu, weights in CASES
    for method, rank in (("galore", 0), ("apollo", 256), ("apollo_mini", 1))
]
"""Rank 0: the largest that fits."""

LAYER_MAJOR: list[tuple[Row, str]] = [
    (Row("7b", "int8", "apollo_mini", 1), "8GB"),
    (Row("7b", "bf16", "adamw", None, states="fp32"), "8GB"),
    (Row("13b", "int8", "apollo_mini", 1), "8GB"),
]


@cache
def job(size: str, length: int = LENGTH) -> Job:
    """Bytes are the same for every card, so one job knows them for all."""
    config = Config.model_validate({"train": {"device": "cuda"}})
    card = find_card(CARDS[-1], "cuda")
    return Job(config, card, read_preset(f"llama-{size}"), 2**20, length, "flash")


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
        ends=row.ends,
    )


Short = Callable[[Job, Choice], int]
"""Bytes that a choice is short of; at most 0 where it fits."""


def presets(gpu: str) -> Short:
    """On this card, as plans count it."""
    usable = find_card(gpu, "cuda").usable_bytes
    return lambda at, made: at.peak(made) - usable


def bare(gpu: str) -> Short:
    """With neither a desktop nor a margin, as the aims count it."""
    usable = find_card(gpu, "cuda").total - BARE
    return lambda at, made: at.tensors(made) - at.workspace - usable


def most_sequences(row: Row, short: Short) -> int:
    """The largest micro-batch that fits, fused and recomputed in full; 0 where none."""

    def needed(sequences: int) -> int:
        return short(job(row.size), choice(row, "fused", sequences, 1))

    return bisect_right(range(1, MOST_SEQUENCES + 1), 0, key=needed)


def largest_rank(like: Choice, at: Job, short: Short) -> int:
    """In steps; 0 where none fits."""
    ranks = range(RANK_STEP, at.model.hidden_size + 1, RANK_STEP)
    fitting = bisect_right(ranks, 0, key=lambda rank: short(at, replace(like, rank=rank)))
    return ranks[fitting - 1] if fitting else 0


def command(size: str, gpu: str, length: int, made: Choice) -> str:
    """A plan with every one of these settings."""
    words = ["lowmem", "plan", "--model", f"llama-{size}", "--gpu", gpu, "--method", made.method]
    words += ["--weights", made.weights, "--seq-len", str(length)]
    words += ["--rank", str(made.rank)] if made.rank is not None else []
    words += ["--states", made.states] if made.method != "adam8bit" else []
    words += ["--ends", made.ends] if made.ends != "exact" else []
    words += ["--update", made.update, "--recompute", made.recompute]
    words += ["--sums", made.sums] if made.sums != "fp32" else []
    if made.update == "layer-major":
        words += ["--boundaries", made.boundaries, "--place", made.place, "--blocks", made.blocks]
    words += ["--batch", f"{made.micro_batch * made.accumulate}seq"]
    return shlex.join([*words, "--micro-batch", str(made.micro_batch)])


def named_row(row: Row, gpu: str) -> tuple[str, str, str]:
    """TRUE_BATCH with this method: the first sums that fit, the largest rank, a micro-batch of 1.

    (line of the table, command, line of its parts)
    """
    length = 1024
    at, short = job(row.size, length), presets(gpu)
    mode: UpdateMode = "fused+subspace" if row.method == "galore" else "unfused"
    for sums in SUMS:
        made = replace(choice(row, mode, 1, TRUE_BATCH // length), sums=sums, clip=1.0)
        if row.rank == 0:
            made = replace(made, rank=largest_rank(made, at, short) or RANK_STEP)
            if made.rank >= LEAST_RANK:
                break
        elif short(at, made) <= 0:
            break
    return told(row.size, gpu, length, made, at.memory(made))


def layer_major_row(row: Row, gpu: str) -> tuple[str, str, str]:
    length, sequences = 1024, 8
    made = replace(
        choice(row, "layer-major", sequences, TRUE_BATCH // length // sequences),
        boundaries="host",
        place="host",
        blocks="host",
    )
    return told(row.size, gpu, length, made, job(row.size, length).memory(made))


def formats(of: Row | Choice) -> str:
    return f"{of.weights}, ends too" if of.ends == "int8" else of.weights


def counts(found: Iterable[int]) -> str:
    return " / ".join(str(count or "-") for count in found)


def fitting_row(row: Row) -> tuple[str, str]:
    """(line of the table, command of its smallest card)."""
    at = job(row.size)
    found = {gpu: most_sequences(row, presets(gpu)) for gpu in CARDS}
    without = [most_sequences(row, bare(gpu)) for gpu in CARDS]
    one, aim = at.tensors(choice(row, "fused", 1, 1)) / MIB, row.aim + at.workspace / MIB
    line = (
        f"| {row.size} | {formats(row)} | {row.method} | {row.rank or '-'} | {one:,.0f} | "
        f"{aim:,.0f} | {counts(found.values())} | {counts(without)} | {counts(row.aims)} |"
    )
    smallest = next((gpu for gpu in CARDS if found[gpu]), None)
    if smallest is None:
        return line, ""
    made = choice(row, "fused", found[smallest], 1)
    return line, command(row.size, smallest, LENGTH, made)


def summed_row(size: str, gpu: str, weights: WeightFormat, aim: int) -> tuple[str, str]:
    at = job(size)
    made = choice(Row(size, weights, "galore"), "fused+subspace", 1, TRUE_BATCH // LENGTH)
    rank, without = (largest_rank(made, at, short(gpu)) for short in (presets, bare))
    made = replace(made, rank=rank)
    peak = at.tensors(made) / MIB
    line = f"| {size} | {gpu} | {weights} | {peak:,.0f} | {rank} | {without} | {aim} |"
    return line, command(size, gpu, LENGTH, made)


def published_row(
    whose: str, row: Row, sequences: int, published: float, aim: float
) -> tuple[str, str]:
    made = choice(row, "fused", sequences, 1)
    peak = job(row.size, 256).tensors(made) / 1e9
    line = f"| {whose} | {sequences} x 256 | {published:.2f} | {aim:.2f} | {peak:.2f} |"
    return line, command(row.size, "24GB", 256, made)


def planned(words: list[str]) -> Plan:
    """The plan of these flags, as the command makes it."""
    pairs = zip(words[::2], words[1::2], strict=True)
    flags = {FLAGS[flag]: value for flag, value in pairs}
    return plan_of(load(flags, [], {}, []).config, for_this_machine=False, reuse=True)


def plan_row(size: str, gpu: str, length: int, flags: tuple[str, ...]) -> tuple[str, str, str]:
    """A batch of TRUE_BATCH tokens, else what the planner takes, else without a desktop.

    (line of the table, command, line of its parts)
    """
    common = ["--model", f"llama-{size}", "--gpu", gpu, "--seq-len", str(length), *flags]
    for more in (["--batch", f"{TRUE_BATCH // length}seq"], [], ["--others", "0MiB"]):
        words = [*common, *more]
        plan = planned(words)
        if plan.fits:
            break
    batch, usable = plan.config.train.batch, plan.card.usable_bytes
    line, _, parts = told(size, gpu, length, plan.choice, plan.memory, batch, usable)
    if not plan.fits:
        return line, "", ""
    return line, shlex.join(["lowmem", "plan", *words]), parts


def told(
    size: str,
    gpu: str,
    length: int,
    made: Choice,
    memory: Memory,
    batch: str = f"{TRUE_BATCH}-tokens",
    usable: int | None = None,
) -> tuple[str, str, str]:
    """(line of the table, a command with all settings, line of its parts)

    usable: bytes, if not those of the card with a desktop. batch: of the update; the last
    micro-batch may be a smaller one.
    """
    case = f"| {size} | {gpu} | {length:,} |"
    short = (memory.reserved - (usable or find_card(gpu, "cuda").usable_bytes)) / MIB
    if short > 0:
        return f"{case} {made.method}: {short:,.0f} MiB short |" + " |" * 10, "", ""
    tokens = rows_of(batch, length) * length
    line = (
        f"{case} {tokens:,} | {made.method} | {made.rank or '-'} | "
        f"{made.states} | {formats(made)} | {made.update} | "
        f"{made.micro_batch} x {made.accumulate} | {made.sums if made.accumulate > 1 else '-'} | "
        f"{memory.tensors / MIB:,.0f} | {memory.reserved / MIB:,.0f} | "
        f"{f'{memory.host / MIB:,.0f}' if memory.host else '-'} |"
    )
    parts = " | ".join(f"{memory.parts.get(part, 0) / MIB:,.0f}" for part in PARTS)
    where = f"{case} {made.method}, {formats(made)}, {made.update} | {parts} |"
    return line, command(size, gpu, length, made), where


def table(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield title
    yield "|" + "---|" * title.strip("|").count("|") + "---|"
    yield from lines
    yield ""


def commands(typed: Iterable[str]) -> Iterator[str]:
    yield "```sh"
    yield from (line for line in typed if line)
    yield "```\n"


PLAN_TITLE = (
    "| model | card | sequence | tokens per update | method | rank | states | weights "
    "| update | micro-batch | sums | tensors | reserved | host |"
)


def plan_tables(found: list[tuple[str, str, str]]) -> Iterator[str]:
    """What was planned, the commands, and where the bytes go."""
    lines, typed, parts = zip(*found, strict=True)
    yield from table(PLAN_TITLE, lines)
    yield from commands(typed)
    yield "Where the tensors' MiB go at the worst moment:\n"
    title = f"| model | card | sequence | plan | {' | '.join(PARTS)} |"
    yield from table(title, (line for line in parts if line))


def page(pool: ProcessPoolExecutor, plans: list[tuple[str, str, str]]) -> Iterator[str]:
    named = pool.map(named_row, *zip(*NAMED, strict=True))
    ordered = pool.map(layer_major_row, *zip(*LAYER_MAJOR, strict=True))
    fitting = pool.map(fitting_row, ROWS)
    summed = pool.map(summed_row, *zip(*SUMMED, strict=True))
    published = pool.map(published_row, *zip(*PUBLISHED, strict=True))
    yield f"""# What fits

`python tests/benchmarks/what_fits.py` makes this page (lowmem {__version__}). All of it is
**rehearsed only**: nothing was measured on a card. Bytes of tensors are exact as far as a CPU can
show; what the card's allocator, context and libraries take are presets (`memory.md`). A card of a
class has what its driver reports, less context, desktop and margin. Peaks are MiB of tensors,
cuBLAS workspaces included; `host` is page-locked memory of the machine, MiB too.

## What lowmem plans by itself

{TRUE_BATCH:,} tokens per update were asked for; where that does not fit, nothing was, and the
planner takes a smaller batch; where that does not fit either, the card drives no desktop. bf16
weights were asked for; int8 weights the planner chose. The commands below print these plans.
"""
    yield from plan_tables(plans)
    yield f"""## With a method and a format of the weights of yours

{TRUE_BATCH:,} tokens per update, micro-batches of one sequence, 8-bit states, recomputation `full`:
GaLore with the largest rank that fits, in steps of {RANK_STEP}, and the first sums of fp32, bf16,
int8 and host with which there is one of {LEAST_RANK} or more; APOLLO with the first that fit. With
256 tokens a sequence the peaks are some MiB lower.
"""
    yield from plan_tables(list(named))
    yield """## Exact large batches on 8 GB

Layer-major order with block inputs, states and weights of blocks in host memory. Sums are exact and
of one block at a time.
"""
    yield from plan_tables(list(ordered))
    yield f"""## The largest micro-batch

One micro-batch per update (`fused`), recomputation `full`, 8-bit states, sequences of {LENGTH:,}.
The peak is that of one sequence; then the largest number of sequences on 8 / 12 / 16 / 24 GB: with
the presets, and on a bare card, without desktop and margin. The aims, which were set before any of
this was built, are of a bare card.
"""
    lines, typed = zip(*fitting, strict=True)
    yield from table(
        "| model | weights | method | rank | peak | aim | micro-batch | bare card | aim |", lines
    )
    yield from commands(typed)
    yield f"""## True batches

GaLore with 8-bit moments and sums in the subspace (`fused+subspace`, float32): any number of
micro-batches of 1 x {LENGTH:,} tokens; the largest rank that fits, in steps of {RANK_STEP}.
"""
    lines, typed = zip(*summed, strict=True)
    yield from table("| model | card | weights | peak | rank | bare card | aim |", lines)
    yield from commands(typed)
    yield """## Against published peaks of 7B

Decimal GB; `fused`, recomputation `full`, 8-bit states.
"""
    lines, typed = zip(*published, strict=True)
    yield from table("| whose | micro-batch | published | aim | tensors |", lines)
    yield from commands(typed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="leave the files alone")
    given = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        plans = list(pool.map(plan_row, *zip(*PLANS, strict=True)))
        text = "\n".join(page(pool, plans)).rstrip() + "\n"
    if given.print:
        print(text)
        return
    TARGET.write_text(text, encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    rows = "\n".join(table(PLAN_TITLE, (line for line, _, _ in plans)))
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n\n{rows}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
