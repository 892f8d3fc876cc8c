"""`lowmem report`: a run as one HTML page in its folder."""

from pathlib import Path

from lowmem.analysis.report import write_report
from lowmem.cli.console import Console
from lowmem.cli.options import Given


def report(given: Given, folders: list[Path]) -> None:
    """Write the pages and say where they are."""
    console = Console(quiet=given.quiet)
    for folder in folders:
        console.result(str(write_report(folder)))
