"""Validation loss of runs that begin alike and differ in the update mode, or the weights' format.

    lowmem data prepare c4/en --out corpus
    python tests/benchmarks/same_start.py corpus modes --out runs/same-start
    python tests/benchmarks/same_start.py corpus weights --out runs/same-start

llama-tiny, some updates of 16 sequences of 128 tokens on one thread of a CPU, each run a `lowmem
train` of its own; rank 32 (Mini: 1), gap 20, all else the method's recipe, without clipping. Seeds
change the weights, the order of the data and every rounding. A run that is complete is not
repeated, one that was cut goes on.

modes    the basis comes from the whole gradient (`unfused`), or from its first micro-batch
         (`fused+subspace`); float32 weights
weights  bf16, int8 in the blocks, and int8 everywhere
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lowmem.train.run import Run, update_of

COMMON = (
    "--model llama-tiny --device cpu --seq-len 128 --batch 16seq --clip off --recompute keep "
    "--eval-every 0 --eval-tokens 100k --save-every 0"
)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Study:
    """rows: name -> flags. variants: the same; the first is what others are held against."""

    rows: dict[str, str]
    variants: dict[str, str]


STUDIES = {
    "modes": Study(
        {
            "galore, 4 micro-batches": "--method galore --rank 32 --gap 20 --micro-batch 4",
            "galore, 16 micro-batches": "--method galore --rank 32 --gap 20 --micro-batch 1",
        },
        {
            "unfused": "--weights fp32 --update unfused",
            "fused+subspace": "--weights fp32 --update fused+subspace",
        },
    ),
    "weights": Study(
        {
            "galore": "--method galore --rank 32 --gap 20 --update unfused --micro-batch 16",
            "apollo_mini": "--method apollo_mini --gap 20 --update unfused --micro-batch 16",
            "q_galore": "--method q_galore --rank 32 --gap 20 --update unfused --micro-batch 16",
        },
        {
            "bf16": "--weights bf16",
            "int8": "--weights int8",
            "int8, ends int8": "--weights int8 --ends int8",
        },
    ),
}


def trained(folder: Path, corpus: Path, flags: str, seed: int, updates: int) -> Run:
    """The run of these flags, made, finished or only read."""
    if folder.exists():
        run = Run.open(folder)
        if run.has_checkpoint and update_of(run.latest()) == updates:
            return run
        words = ["resume", str(folder)]
    else:
        own = f"--seed {seed} --updates {updates} --name {folder.name}"
        words = ["train", *shlex.split(f"{COMMON} {flags} {own}")]
        words += ["--data", str(corpus), "--out", str(folder.parent)]
    command = [sys.executable, "-m", "lowmem", *words, "--quiet"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=one_thread, stdout=sys.stderr)
    return Run.open(folder)


def loss_of(run: Run, updates: int) -> float:
    """That of the last evaluation; ValueError where updates were left out, for then others are
    compared."""
    lines = run.metrics()
    made = sum("loss" in line for line in lines)
    if made != updates:
        raise ValueError(f"{run.folder} has made {made} of {updates} updates")
    return float([line["eval_loss"] for line in lines if "eval_loss" in line][-1])


def slug(*names: object) -> str:
    return "-".join(str(name) for name in names).replace(", ", "-").replace(" ", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path, help="a folder of `lowmem data prepare`")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/same-start"))
    parser.add_argument("--row", action="append", help="only this row; may be repeated")
    parser.add_argument("--seed", type=int, action="append", help="instead of 0 and 1")
    parser.add_argument("--updates", type=int, default=150)
    given = parser.parse_args()
    study = STUDIES[given.study]
    print(f"| run | seed | {' | '.join(study.variants)} |")
    print("|---|---|" + "---|" * len(study.variants))
    rows = given.row or study.rows
    for seed, row in itertools.product(given.seed or SEEDS, rows):
        flags, losses = study.rows[row], []
        for variant, more in study.variants.items():
            folder = given.out / slug(row, variant, seed)
            run = trained(folder, given.corpus, f"{flags} {more}", seed, given.updates)
            losses.append(loss_of(run, given.updates))
        first = losses[0]
        others = [f"{loss:.4f} ({100 * (loss / first - 1):+.2f} %)" for loss in losses[1:]]
        print(f"| {row} | {seed} | {' | '.join([f'{first:.4f}', *others])} |", flush=True)


if __name__ == "__main__":
    main()
