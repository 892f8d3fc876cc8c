"""`lowmem plot`: curves of runs, in the terminal or as a picture."""

from dataclasses import dataclass
from pathlib import Path

from lowmem.analysis.figures import losses
from lowmem.analysis.history import read_all
from lowmem.analysis.image import require_format, write_image
from lowmem.analysis.terminal import drawn
from lowmem.cli.console import Console
from lowmem.cli.options import Given


@dataclass(frozen=True)
class Asked:
    """What against what, smoothed over how many updates (None: chosen), and into which file."""

    x: str
    y: str
    smooth: int | None
    out: Path | None


def plot(given: Given, folders: list[Path], asked: Asked) -> None:
    """Draw the figure in letters on stdout, or into the file `asked.out`."""
    console = Console(quiet=given.quiet)
    if asked.out is not None:
        require_format(asked.out)
    runs = read_all(folders)
    figure = losses(runs, asked.x, asked.y, asked.smooth)
    for run in runs:
        for warning in run.warnings:
            console.say(f"warning: {run.folder}: {warning}")
    if asked.out is None:
        for line in drawn(figure, console.width):
            console.result(line)
    else:
        write_image(figure, asked.out)
        console.result(str(asked.out))
