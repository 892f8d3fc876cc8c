"""`lowmem doctor --resume`: kill runs with SIGKILL at random points and prove that nothing is lost.

For each update mode, with a method of its own, a run that is left alone, and the same run in
processes of its own that are killed again and again and resumed. Losses, evaluations and the files
of the last checkpoint must be equal bit for bit.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.defaults import settle
from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError
from lowmem.tensorfile import sha256_of
from lowmem.train.checkpoint import verify
from lowmem.train.run import Run

# Every update mode; 8-bit moments, a regenerated random projection, integer weights, and everything
# that can live in host memory there.
METHODS: dict[str, dict[str, Any]] = {
    "galore 8bit": {
        "optimizer": {"method": "galore", "states": "8bit", "min_8bit": 0},
        "train": {"update": "fused+subspace"},
    },
    "apollo": {
        "optimizer": {"method": "apollo"},
        "train": {"update": "fused", "micro_batch": 4, "clip": "off"},
    },
    "q_galore int8": {
        "optimizer": {"method": "q_galore"},
        "train": {"weights": "int8", "update": "unfused"},
    },
    "fira": {
        "optimizer": {"method": "fira", "place": "host"},
        "train": {
            "update": "layer-major",
            "recompute": "full",
            "clip": "off",
            "boundaries": "host",
            "blocks": "host",
        },
    },
}
_UPDATES_PER_KILL = 8
_SLOWEST_START = 300.0  # seconds until the first update of a process
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass
class Trial:
    """What became of the runs of one method. lost: checkpoints that a kill cost or spoilt."""

    method: str
    update: str = ""
    kills: int = 0
    while_loading: int = 0
    while_saving: int = 0
    lost: int = 0
    differing_losses: int = 0
    losses: int = 0
    differing_files: int = 0

    @property
    def passed(self) -> bool:
        return not (self.lost or self.differing_losses or self.differing_files)


def doctor_resume(given: Given, kills: int, *, as_json: bool) -> None:
    """Run the trials; CheckpointError (exit 5) unless all continued bit for bit."""
    console = Console(quiet=given.quiet)
    with tempfile.TemporaryDirectory(prefix="lowmem-doctor-") as folder:
        trials = run_trials(Path(folder), kills, console.say)
    if as_json:
        console.json({"schema_version": 1, "trials": [asdict(trial) for trial in trials]})
    else:
        console.table(
            [
                "method",
                "update",
                ">kills",
                ">loading",
                ">saving",
                ">lost",
                ">losses",
                ">differ",
                ">files differ",
            ],
            [_row(trial) for trial in trials],
        )
    failed = [trial.method for trial in trials if not trial.passed]
    if failed:
        raise CheckpointError(
            f"a killed run did not continue as an unbroken one: {', '.join(failed)}",
            "on this machine, exact resume does not hold",
            "please report this with `lowmem doctor --report`",
        )


def run_trials(folder: Path, kills: int, say: Callable[[str], None]) -> list[Trial]:
    """`kills` kills, shared among the methods."""
    from lowmem.data.sample import sample_corpus

    say("preparing the corpus `sample`")
    corpus = sample_corpus()
    count = len(METHODS)
    shares = [kills // count + (n < kills % count) for n in range(count)]
    trials = []
    for (name, sections), share in zip(METHODS.items(), shares, strict=True):
        began = time.monotonic()
        trials.append(trial(name, sections, share, folder, corpus))
        say(f"{name}: {share} kills, {time.monotonic() - began:.0f} s")
    return trials


def trial(name: str, sections: dict[str, Any], kills: int, folder: Path, corpus: Corpus) -> Trial:
    """An unbroken run of a method and a killed one, compared."""
    config = _config(sections, kills, folder / name.replace(" ", "-"), corpus)
    whole, broken = (_made(config, which) for which in ("whole", "broken"))
    found, draw = Trial(name, sections["train"]["update"]), random.Random(name)
    subprocess.run(_command(whole), check=True, **_SILENT)
    seconds = _seconds_per_update(whole)
    while found.kills < kills:
        if not _kill_once(broken, draw, seconds, found):
            break  # it has come to its end before
    subprocess.run(_command(broken), check=True, **_SILENT)
    compare(whole, broken, found)
    return found


def _config(sections: dict[str, Any], kills: int, out: Path, corpus: Corpus) -> Config:
    """A run of a few seconds that needs no plan; it saves at every second update."""
    train = {
        "updates": 2 * _UPDATES_PER_KILL * (kills + 1),  # more than the kills leave time for
        "batch": "4seq",
        "micro_batch": 2,
        "recompute": "keep",
        "clip": 1.0,
        "device": "cpu",
    } | sections["train"]
    optimizer = {"rank": 8, "lr": 0.003, "gap": 5} | sections["optimizer"]
    config = Config.model_validate(
        {
            "model": _TINY | {"vocab_size": corpus.vocab_size, "max_position_embeddings": 64},
            "data": {"source": str(corpus.folder), "seq_len": 32},
            "optimizer": optimizer,
            "train": train,
            "evaluate": {"every": 10, "tokens": 500},
            "checkpoint": {"every": 2},
            "run": {"out": str(out)},
        }
    )
    return settle(config, cuda=False)[0]


def _made(config: Config, name: str) -> Run:
    return Run.create(
        config.model_copy(update={"run": config.run.model_copy(update={"name": name})}), None
    )


def _command(run: Run) -> list[str]:
    return [sys.executable, "-m", "lowmem", "resume", str(run.folder), "--quiet"]


_SILENT: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _seconds_per_update(run: Run) -> float:
    """With its share of saves and evaluations: from the first line of metrics to the last."""
    lines = [line["seconds"] for line in run.metrics() if "loss" in line]
    return 3 * sum(lines) / len(lines)


def _kill_once(run: Run, draw: random.Random, seconds: float, trial: Trial) -> bool:
    """Start a process on the run and kill it; False if the run has ended before.

    One kill in five hits it while it loads, the others at a random time within some updates.
    """
    before = _metrics_bytes(run)
    process = subprocess.Popen(_command(run), **_SILENT)
    began = time.monotonic()
    loading = draw.random() < 0.2
    if loading:
        time.sleep(draw.uniform(0.0, 3.0))
    else:
        while process.poll() is None and _metrics_bytes(run) == before:
            if time.monotonic() - began > _SLOWEST_START:
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, _UPDATES_PER_KILL * seconds))
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trial.kills += 1
    trial.while_loading += loading
    trial.while_saving += any(run.checkpoints.glob(".tmp-*"))
    trial.lost += not _intact(run)
    return True


def _metrics_bytes(run: Run) -> tuple[int, int]:
    """Something that changes with every update; a process that begins makes the file anew."""
    path = run.folder / "metrics.jsonl"
    lines = run.metrics() if path.is_file() else []
    return len(lines), lines[-1]["update"] if lines else -1


def _intact(run: Run) -> bool:
    """Does the newest checkpoint load? Without any, nothing was saved yet."""
    if not run.has_checkpoint:
        return not run.complete()
    try:
        verify(run.latest())
    except CheckpointError:
        return False
    return True


def compare(whole: Run, broken: Run, trial: Trial) -> None:
    told, again = (_told(run) for run in (whole, broken))
    trial.losses = len(told)
    trial.differing_losses = sum(a != b for a, b in zip(told, again, strict=False))
    trial.differing_losses += abs(len(told) - len(again))
    files, others = (_files(run) for run in (whole, broken))
    trial.differing_files = sum(files.get(key) != others.get(key) for key in files | others)


def _told(run: Run) -> list[tuple[Any, ...]]:
    keys = ("update", "loss", "grad_norm", "eval_loss")
    return [tuple(line.get(key) for key in keys) for line in run.metrics()]


def _files(run: Run) -> dict[str, str]:
    """sha256 by name of the last checkpoint's weights, states and counters."""
    folder = run.latest()
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "state.json"
    }


def _row(trial: Trial) -> Sequence[str]:
    numbers = (
        trial.kills,
        trial.while_loading,
        trial.while_saving,
        trial.lost,
        trial.losses,
        trial.differing_losses,
        trial.differing_files,
    )
    return [trial.method, trial.update, *map(str, numbers)]
