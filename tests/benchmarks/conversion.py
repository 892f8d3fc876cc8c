"""What a conversion costs: validation loss after 10, 50 more updates, beside the unbroken run.

    python tests/benchmarks/conversion.py --out FOLDER

A small decoder on the sample corpus; every case resumes the same checkpoint of update 100.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from lowmem.cli.main import run as command
from lowmem.train.run import Run

START, MORE = 100, 50
MODEL = """[model]
hidden_size = 64
intermediate_size = 176
num_hidden_layers = 2
num_attention_heads = 4
vocab_size = {vocab_size}
max_position_embeddings = 64
"""
TRAIN = f"""--device cpu --updates {START + MORE} --batch 8seq --micro-batch 8 --seq-len 32
--eval-every 10 --eval-tokens 8000 --save-every {START} --update unfused --recompute keep
--schedule constant --warmup 10 --quiet"""


@dataclass(frozen=True)
class Case:
    """One conversion. base: the flags of the run; change: those of resume."""

    base: str
    change: str


GALORE = "--method galore --rank 16 --gap 50 --lr 0.01"
ADAMW = "--method adamw --lr 0.002"
APOLLO = "--method apollo --rank 16 --gap 50 --lr 0.01"
CASES = (
    Case(GALORE, "--states 8bit"),
    Case(GALORE, "--rank 8"),
    Case(GALORE, "--rank 32"),
    Case(GALORE, "--weights int8"),
    Case(GALORE, "--method fira"),
    Case(GALORE, "--method adamw --lr 0.002"),
    Case(ADAMW, "--method adam8bit"),
    Case(ADAMW, "--method galore --rank 16 --lr 0.01"),
    Case(ADAMW, "--method lion --lr 0.0002"),
    Case(APOLLO, "--rank 8"),
)


def evaluations(run: Run) -> dict[int, float]:
    """Updates done -> validation loss."""
    return {line["update"] + 1: line["eval_loss"] for line in run.metrics() if "eval_loss" in line}


def trained(base: str, out: Path, number: int, config: Path) -> Run:
    name = f"base-{number}"
    flags = [*base.split(), *TRAIN.split(), "--config", str(config)]
    assert command(["train", *flags, "--out", str(out), "--name", name]) == 0
    return Run.open(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True, help="of the sample's tokenizer")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    config = given.out / "small.toml"
    config.write_text(MODEL.format(vocab_size=given.vocab_size))
    bases = {
        base: trained(base, given.out, number, config)
        for number, base in enumerate(dict.fromkeys(case.base for case in CASES))
    }
    print("| run | resumed with | at 100 | unbroken 110, 150 | converted 110, 150 | difference |")
    print("|---|---|---|---|---|---|")
    for number, case in enumerate(CASES):
        copy = given.out / f"case-{number}"
        shutil.copytree(bases[case.base].folder, copy)
        start = copy / "checkpoints" / f"step-{START:06d}"
        assert command(["resume", str(start), *case.change.split(), "--quiet"]) == 0
        before, after = evaluations(bases[case.base]), evaluations(Run.open(copy))
        ends = [START + 10, START + MORE]
        pairs = [", ".join(f"{of[end]:.3f}" for end in ends) for of in (before, after)]
        off = ", ".join(f"{after[end] - before[end]:+.3f}" for end in ends)
        print(
            f"| {case.base.split()[1]} | {case.change} | {before[START]:.3f} | {pairs[0]}", end=""
        )
        print(f" | {pairs[1]} | {off} |", flush=True)


if __name__ == "__main__":
    main()
