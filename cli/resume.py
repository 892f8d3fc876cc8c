"""`lowmem resume`: continue a run."""

from dataclasses import replace
from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.train import corpus_of, show_finished, traced_in
from lowmem.config.defaults import rows_of
from lowmem.config.load import load
from lowmem.config.schema import Config, settled
from lowmem.errors import ConfigError, nearest
from lowmem.train.checkpoint import newest_intact
from lowmem.train.loop import train
from lowmem.train.run import Run


def resume(given: Given, folder: Path, start: str | None, *, as_json: bool) -> None:
    """Train on in `folder` from its newest checkpoint, or from the one before it."""
    console = Console(quiet=given.quiet, verbose=given.verbose)
    run = Run.open(folder)
    if start is not None:
        run = _from_previous(run, start)
        console.say(f"from {run.start}")
    if given.flags:
        run = _changed(run, given, console)
    corpus = corpus_of(run.config, console)
    with console.progress() as report, traced_in(run.folder):
        finished = train(run, corpus, report)
    show_finished(console, finished, run.folder, as_json=as_json)


def _from_previous(run: Run, start: str) -> Run:
    if start != "previous":
        raise ConfigError(
            f"--from {start} must be previous",
            nearest(start, ["previous"]),
            f"a certain checkpoint is given by its path: ls {run.checkpoints}",
        )
    return replace(run, start=newest_intact(run, run.latest()))


def _changed(run: Run, given: Given, console: Console) -> Run:
    """The run with another micro-batch or recomputation, from now on."""
    config = load(given.flags, [run.folder / "config.toml"], environ={}).config
    train, rows = config.train, _rows(config)
    micro = rows if train.micro_batch == "auto" else settled(train.micro_batch)
    if micro > rows or (train.update == "fused" and micro < rows):
        why = "a micro-batch is a part of the batch"
        if train.update == "fused":
            why = "fused updates cannot accumulate micro-batches"
        raise ConfigError(
            f"train.micro_batch = {micro} for updates of {rows} sequences",
            why,
            f"--micro-batch {rows}",
        )
    run.write_config(config)
    said = "the batches stay the same; sums round otherwise, so it is not bit for bit"
    if train.update == "fused+subspace":
        said += ", and a subspace chosen from the first micro-batch is another"
    console.say(f"micro-batch {micro}, recompute {train.recompute}: {said}")
    return replace(run, config=config)


def _rows(config: Config) -> int:
    return rows_of(config.train.batch, settled(config.data.seq_len))
