"""`lowmem resume`: continue a run."""

from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.train import corpus_of, show_finished, traced_in
from lowmem.train.loop import train
from lowmem.train.run import Run


def resume(given: Given, folder: Path, *, as_json: bool) -> None:
    """Train on in `folder` from its newest checkpoint."""
    console = Console(quiet=given.quiet, verbose=given.verbose)
    run = Run.open(folder)
    corpus = corpus_of(run.config, console)
    with console.progress() as report, traced_in(run.folder):
        finished = train(run, corpus, report)
    show_finished(console, finished, run.folder, as_json=as_json)
