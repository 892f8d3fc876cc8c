"""`lowmem resume`: continue a run."""

import os
from dataclasses import replace
from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import planned, require_fit
from lowmem.cli.train import corpus_of, show_finished, traced_in
from lowmem.config.defaults import rows_of
from lowmem.config.load import load
from lowmem.config.schema import Config, settled
from lowmem.errors import ConfigError, DataError, nearest, short_path
from lowmem.planner.plan import Plan
from lowmem.train.checkpoint import newest_intact
from lowmem.train.elastic import changed, first_that_fits, require_convertible
from lowmem.train.loop import train
from lowmem.train.run import Run, update_of


def resume(given: Given, folder: Path, start: str | None, *, as_json: bool) -> None:
    """Train on in `folder` from its newest checkpoint, or from the one before it."""
    console = Console(quiet=given.quiet, verbose=given.verbose)
    run = Run.open(folder)
    if start is not None:
        run = _from_previous(run, start)
        console.say(f"from {run.start}")
    _require_text(run)
    if given.flags:
        run = _changed(run, given, console)
    corpus = corpus_of(run.config, console)
    with console.progress() as report, traced_in(run.folder):
        finished = train(run, corpus, report)
    show_finished(console, finished, run.folder, as_json=as_json)


def _require_text(run: Run) -> None:
    """DataError: the text of the run has been moved. No flag names another: it must be the same."""
    source = run.config.data.source
    if source not in ("sample", "c4") and not os.path.exists(os.path.expanduser(source)):
        raise DataError(
            f"{short_path(source)} does not exist",
            "the run has its text from there",
            f"put it back, or write its new place into {run.folder / 'config.toml'}: data.source; "
            "the tokens are compared before anything is trained",
        )


def _from_previous(run: Run, start: str) -> Run:
    if start != "previous":
        raise ConfigError(
            f"--from {start} must be previous",
            nearest(start, ["previous"]),
            f"a certain checkpoint is given by its path: ls {run.checkpoints}",
        )
    return replace(run, start=newest_intact(run, run.latest()))


def _changed(run: Run, given: Given, console: Console) -> Run:
    """The run with other settings from now on, planned anew; nothing is written if it cannot be."""
    asked = load(given.flags, [run.folder / "config.toml"], environ={}).config
    config = changed(run.config, asked, set(given.flags))
    _require_micro_batch(config)
    plan = _planned(config, set(given.flags), console)
    console.plan(plan, as_result=False)
    require_fit(plan)
    if run.has_checkpoint:
        _require_unfinished(run)
        require_convertible(run.latest(), plan.config)
    run.write_config(plan.config, plan.to_json())
    return replace(run, config=plan.config)


def _require_unfinished(run: Run) -> None:
    """ConfigError where no update is left that other settings could change."""
    updates, newest = settled(run.config.train.updates), run.latest()
    if update_of(newest) >= updates:
        raise ConfigError(
            f"all {updates} updates of {run.folder} are done",
            f"other settings would change nothing after {newest.name}",
            f"start from an earlier checkpoint: ls {run.checkpoints}",
        )


def _planned(config: Config, given: set[str], console: Console) -> Plan:
    """The plan of `config` itself or, for another --gpu, of the first way down that fits."""
    if "gpu" not in given:
        return _planned_here(config)
    plan, ways = first_that_fits(config, given, _planned_here)
    for way in ways:
        console.say(f"{way.sentence()}: {'fits' if way.fits else 'does not fit'}")
    return plan


def _planned_here(config: Config) -> Plan:
    """The plan for this machine."""
    return planned(config, for_this_machine=True)


def _require_micro_batch(config: Config) -> None:
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


def _rows(config: Config) -> int:
    return rows_of(config.train.batch, settled(config.data.seq_len))
