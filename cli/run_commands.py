"""The commands that make runs and use what they have made: plan, train, resume, eval, ..."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.options import CHANGEABLE, EVALUATION, SETTINGS, Given, Json, named, with_settings

Weights = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="a run, one of its checkpoints, or a Hugging Face folder",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="stop after the plan")]


def add_to(app: typer.Typer, panel: str) -> None:
    """The commands of this file, in the order of --help."""
    reproduced = [setting for setting in SETTINGS if setting.flag not in ("--scale", "--recipe")]
    app.command("plan", rich_help_panel=panel)(with_settings(plan, SETTINGS, files=True))
    app.command("train", rich_help_panel=panel)(with_settings(train, SETTINGS, files=True))
    app.command("reproduce", rich_help_panel=panel)(
        with_settings(reproduce, reproduced, files=True)
    )
    app.command("resume", rich_help_panel=panel)(with_settings(resume, named(*CHANGEABLE)))
    app.command("eval", rich_help_panel=panel)(with_settings(evaluate, named(*EVALUATION)))
    app.command("export", rich_help_panel=panel)(with_settings(export))
    app.command("sample", rich_help_panel=panel)(with_settings(sample))
    app.command("sweep", rich_help_panel=panel)(with_settings(sweep, SETTINGS, files=True))


def plan(
    given: Given,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="run two updates of it on this machine, and compare"),
    ] = False,
    why: Annotated[
        str | None, typer.Option(metavar="METHOD", help="why it is chosen or not, and its needs")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="12GB,24GB", help="a row for each of these cards")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="plan anew what was planned before")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of --json, and stop")
    ] = False,
    json: Json = False,
) -> None:
    """Predict the memory of a run and choose what fits; needs no GPU.

    \b
    Examples:
      lowmem plan --gpu 24GB --model llama-7b
      lowmem plan --gpu rtx3060-12gb --model llama-1b --method galore --rank 256
      lowmem plan --gpu 16GB --model ./my-llama/config.json --json
      lowmem plan --verify --gpu 12GB --model llama-350m
      lowmem plan --gpu 16GB --model llama-7b --why galore
      lowmem plan --model llama-7b --compare 12GB,16GB,24GB
    """
    from lowmem.cli import plan as command

    if schema:
        command.schema(given)
    else:
        asked = command.Asked(verify=verify, why=why, compare=compare, reuse=not no_cache)
        command.plan(given, asked, as_json=json)


def train(
    given: Given,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Plan and train a new run in ./runs/NAME. Ctrl-C saves and stops.

    \b
    Examples:
      lowmem train --gpu 24GB
      lowmem train --model llama-60m --data ./corpus --updates 10000
      lowmem train --config run.toml --method adamw --name baseline
    """
    from lowmem.cli import train as command

    command.train(given, dry_run=dry_run, as_json=json)


def reproduce(
    given: Given,
    recipe: Annotated[
        str, typer.Argument(metavar="NAME", help="a recipe, or list", show_default=False)
    ],
    scale: Annotated[
        float | None,
        typer.Option("--scale", metavar="0.1", help="a shortened run: this share of every length"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="30min", help="shortened to what this machine does in it")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run the settings of a publication, evaluate its way, and say whether the figure is met.

    What is done in another way is listed; a shortened run says that it is shortened. The same
    command continues a run that was interrupted. The verdict lies in RUN/verdict.json.

    \b
    Examples:
      lowmem reproduce list
      lowmem reproduce galore-60m --data ./c4 --tokenizer ./t5-base
      lowmem reproduce fira-60m --budget 30min
      lowmem reproduce galore-60m --scale 0.001 --batch 8seq
    """
    from lowmem.cli import reproduce as command

    command.reproduce(given, recipe, command.Asked(scale, budget, dry_run), as_json=json)


def resume(
    given: Given,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder", show_default=False)],
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="previous", help="the newest intact one before the newest"),
    ] = None,
    json: Json = False,
) -> None:
    """Continue a run exactly where its last checkpoint stands, or with other settings.

    With settings the run is planned anew and its state converted; a table says what of it is exact.
    Data order, schedule and update stay. --gpu takes the first of: the settings as they are,
    another micro-batch, 8-bit states, smaller ranks, int8 weights.

    \b
    Examples:
      lowmem resume runs/llama-60m-galore-1
      lowmem resume runs/llama-60m-galore-1/checkpoints/step-002000
      lowmem resume runs/llama-60m-galore-1 --from previous
      lowmem resume runs/llama-60m-galore-1 --micro-batch 4 --recompute full
      lowmem resume runs/llama-60m-galore-1 --gpu 12GB
      lowmem resume runs/llama-60m-galore-1 --rank 64 --states 8bit
    """
    from lowmem.cli import resume as command

    command.resume(given, run, start, as_json=json)


def evaluate(given: Given, path: Weights, json: Json = False) -> None:
    """Loss and perplexity of a model, weighted by tokens.

    \b
    Examples:
      lowmem eval runs/llama-60m-galore-1
      lowmem eval ./my-llama --data ./corpus --eval-tokens 1M --json
    """
    from lowmem.cli import evaluate as command

    command.evaluate(given, path, as_json=json)


def export(
    given: Given,
    path: Weights,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder", show_default=False)],
) -> None:
    """Write a Hugging Face folder: safetensors, config.json, tokenizer.

    \b
    Example:
      lowmem export runs/llama-60m-galore-1 hf-out
    """
    from lowmem.cli import export as command

    command.export(given, path, out)


def sample(
    given: Given,
    path: Weights,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="what the text begins with")] = "",
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="tokens to generate")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="K", help="0 considers all tokens")] = 50,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="of the choices")] = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda", help="where to compute")
    ] = "auto",
    json: Json = False,
) -> None:
    """Generate text from a checkpoint.

    \b
    Example:
      lowmem sample runs/llama-60m-galore-1 --prompt "The " --tokens 50
    """
    from lowmem.cli import sample as command

    choice = command.Choice(tokens, temperature, top_k, seed)
    command.sample(given, path, prompt, choice, device=device, as_json=json)


def sweep(
    given: Given,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="a sweep in TOML", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="N|0,1,2", help="of every setting; 3 is 0, 1 and 2"),
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train every combination of settings with every seed, one after the other.

    Without FILE, --method, --lr and --rank take several values with commas between them. What does
    not fit is named before anything runs. Ctrl-C saves and stops; the same command goes on, and
    what is finished is not repeated. Trials are ordinary runs in runs/NAME.

    \b
    Examples:
      lowmem sweep --method adamw,galore --lr 0.001,0.003 --seeds 3 --model llama-9m --name rates
      lowmem sweep rates.toml --dry-run
    """
    from lowmem.cli import sweep as command

    command.sweep(given, command.Asked(file, seeds, dry_run), as_json=json)
