"""The surface of the program; none of its commands imports torch to show help.

A command's arguments stand in `*_commands.py`, what it does in the module of its name, imported
when it runs.
"""

from typing import Annotated

import typer

from lowmem import __version__
from lowmem.cli import machine_commands, result_commands, run_commands
from lowmem.cli.errors import EXIT_CODES

_EXITS = " | ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
_LOOK = "Data, configuration, machine"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Exit codes: {_EXITS}",
)


@app.callback(invoke_without_command=True)
def lowmem(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Pretrain LLaMA-style models when the GPU is smaller than the model."""
    if version:
        typer.echo(f"lowmem {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


run_commands.add_to(app, "Runs")
result_commands.add_to(app, "Results", _LOOK)
machine_commands.add_to(app, _LOOK)
