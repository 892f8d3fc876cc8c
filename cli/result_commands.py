"""The commands that look at runs, and at what is known of methods: compare, plot, methods, ..."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.options import Given, Json, with_settings

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")]


def add_to(app: typer.Typer, panel: str, last_panel: str) -> None:
    """The commands of this file, in the order of --help."""
    app.command("compare", rich_help_panel=panel)(with_settings(compare))
    app.command("plot", rich_help_panel=panel)(with_settings(plot))
    app.command("report", rich_help_panel=panel)(with_settings(report))
    app.command("methods", rich_help_panel=last_panel)(with_settings(methods))
    app.command("results", rich_help_panel=last_panel)(with_settings(results))


def compare(given: Given, runs: Runs, json: Json = False) -> None:
    """Put runs side by side, and say whether that is fair.

    Runs that differ only in their seeds are one row, with a confidence interval. What makes runs
    unequal (tokens, batch, protocol, data, tokenizer, evaluation, number of seeds) is named.

    \b
    Examples:
      lowmem compare runs/galore-0 runs/galore-1 runs/adamw-0 runs/adamw-1
      lowmem compare runs/* --json
    """
    from lowmem.cli import compare as command

    command.compare(given, runs, as_json=json)


def plot(
    given: Given,
    runs: Runs,
    x: Annotated[
        str, typer.Option("--x", metavar="tokens|time|memory|update", help="across")
    ] = "tokens",
    y: Annotated[
        str, typer.Option("--y", metavar="loss|perplexity", help="upwards")
    ] = "perplexity",
    smooth: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="updates; default: a 25th of the run")
    ] = None,
    out: Annotated[
        Path | None,
        # The bracket would be read as markup.
        typer.Option("--out", "-o", metavar="FILE", help=r"a .png or .svg; needs lowmem\[plot]"),
    ] = None,
) -> None:
    """Draw loss or perplexity of runs, in the terminal or into a file.

    Published results of the same model under the same protocol are marked.

    \b
    Examples:
      lowmem plot runs/llama-60m-galore-1 runs/llama-60m-adamw-1
      lowmem plot runs/* --x time --y loss
      lowmem plot runs/* --x memory --out memory.png
    """
    from lowmem.cli import plot as command

    command.plot(given, runs, command.Asked(x, y, smooth, out))


def report(given: Given, runs: Runs) -> None:
    """Write report.html into the folder of each run: one page that needs nothing else.

    \b
    Example:
      lowmem report runs/llama-60m-galore-1
    """
    from lowmem.cli import report as command

    command.report(given, runs)


def methods(
    given: Given,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="one method", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the methods, or show what one is composed of and its arguments.

    \b
    Example:
      lowmem methods galore
    """
    from lowmem.cli import methods as command

    command.methods(given, name, as_json=json)


def results(
    given: Given,
    model: Annotated[
        str | None, typer.Option(metavar="60m", help="of models of this size alone")
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="of this method alone")] = None,
    json: Json = False,
) -> None:
    """List what is published of methods: perplexity, memory, speed, each with its source.

    \b
    Examples:
      lowmem results --model 60m
      lowmem results --method galore --json
    """
    from lowmem.cli import results as command

    command.results(given, model, method, as_json=json)
