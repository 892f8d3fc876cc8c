"""Fuzz lowmem's readers and report what happened.

    python tests/fuzz/run.py --configs 100000 --files 10000 --seed 0
    python tests/fuzz/run.py --configs 1 --files 0 --seed 0 --first 17     case 17 again

Exits with 1 if any case ended otherwise than well or with an error of lowmem's.
"""

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, the project is not found

from tests.fuzz import configurations, files
from tests.fuzz.verdict import Tally

_MOST_SHOWN = 20


def fuzz_configurations(count: int, seed: int, first: int = 0) -> Tally:
    """`count` configurations of `seed`."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            rng = random.Random(f"{seed}/configs/{number}")
            tally.run(f"configs/{number}", partial(configurations.one, rng, Path(folder)))
    return tally


def fuzz_files(count: int, seed: int, first: int = 0) -> dict[str, Tally]:
    """`count` damaged files of `seed`, in turn of every kind; one tally for each."""
    with tempfile.TemporaryDirectory() as folder:
        cases = list(files.kinds(Path(folder)).items())
        tallies = {name: Tally() for name, _ in cases}
        for number in range(first, first + count):
            rng = random.Random(f"{seed}/files/{number}")
            name, case = cases[number % len(cases)]
            tallies[name].run(f"files/{number} {name}", partial(case, rng))
    return tallies


def main() -> int:
    """Parse the command line, run, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", type=int, default=100_000, help="configurations")
    parser.add_argument("--files", type=int, default=10_000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    asked = parser.parse_args()
    began = time.perf_counter()
    tallies = {}
    if asked.configs:
        tallies["configurations"] = fuzz_configurations(asked.configs, asked.seed, asked.first)
    if asked.files:
        tallies |= fuzz_files(asked.files, asked.seed, asked.first)
    for name, tally in tallies.items():
        print(f"{name:17}  {tally.line()}")
    print(f"{time.perf_counter() - began:.0f} s, seed {asked.seed}")
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    print("\n".join(failures[:_MOST_SHOWN]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
