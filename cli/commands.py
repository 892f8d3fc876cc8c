"""The surface of the program: every command with its arguments; none imports torch to show help.

What a command does stands in the module of its name, imported when it runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from lowmem import __version__
from lowmem.cli.errors import EXIT_CODES
from lowmem.cli.options import (
    CHANGEABLE,
    EVALUATION,
    SETTINGS,
    Given,
    Json,
    named,
    with_settings,
)

_EXITS = " | ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Exit codes: {_EXITS}",
)
bench = typer.Typer(help="Measure the parts of a training step on this machine.")
data = typer.Typer(help="Turn text into token shards, and look at them.")
config = typer.Typer(help="Show, check and describe configurations.")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder", show_default=False)]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")]
Weights = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="a run, one of its checkpoints, or a Hugging Face folder",
        show_default=False,
    ),
]
Corpus = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="a prepared corpus", show_default=False)
]
Tokenizer = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        metavar="PATH|NAME",
        help="a folder, a file or a hub name; auto: the sample's",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="where to compute")]


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
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="stop after the plan")] = False,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="stop after the plan")] = False,
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
    run: Run,
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
    device: Device = "auto",
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
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="stop after the plan")] = False,
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
        typer.Option("--out", "-o", metavar="FILE", help="a .png or .svg; needs lowmem[plot]"),
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


def doctor(
    given: Given,
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="for --report", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="kill runs at random points, compare bit for bit")
    ] = False,
    kills: Annotated[int, typer.Option(min=1, metavar="N", help="of --resume")] = 9,
    disk: Annotated[
        bool, typer.Option("--disk", help="speed and room of --out, for --model's checkpoints")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="every kernel against its reference, with times")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="for bug reports; no private paths, names or tokens")
    ] = False,
    json: Json = False,
) -> None:
    """What this machine offers: versions, device, cache, variables.

    \b
    Examples:
      lowmem doctor
      lowmem doctor --resume --kills 50
      lowmem doctor --disk --model llama-1b --out runs
      lowmem doctor --kernels
      lowmem doctor --report runs/llama-60m-galore-1
    """
    from lowmem.cli import doctor as command

    asked = command.Asked(
        resume=kills if resume else 0, disk=disk, report=report, kernels=kernels, run=run
    )
    command.doctor(given, asked, as_json=json)


def bench_kernels(given: Given, json: Json = False) -> None:
    """Time every kernel beside its reference and beside a copy of as many bytes.

    \b
    Examples:
      lowmem bench kernels
      OMP_NUM_THREADS=1 lowmem bench kernels --json
    """
    from lowmem.cli.kernels import bench_kernels as command

    command(given, as_json=json)


def bench_optimizer(given: Given, json: Json = False) -> None:
    """Time a step of several methods beside fused AdamW and 8-bit AdamW of other packages.

    \b
    Examples:
      lowmem bench optimizer
      lowmem bench optimizer --model llama-130m --json
    """
    from lowmem.cli.bench_optimizer import bench_optimizer as command

    command(given, as_json=json)


def prepare(
    given: Given,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="text, .jsonl(.gz), .parquet, a folder, or c4"),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="default: in the cache"),
    ] = None,
    tokenizer: Tokenizer = "auto",
    text_key: Annotated[
        str, typer.Option(metavar="KEY", help="of a JSON line or column that holds text")
    ] = "text",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="count unreadable lines instead of failing")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="processes; default: one a core")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="200M", help="stop after so many tokens")
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(metavar="lowmem|galore", help="packed, or documents cut as in the papers"),
    ] = "lowmem",
    seq_len: Annotated[
        int,
        typer.Option("--seq-len", min=2, metavar="N", help="galore: tokens of a cut document"),
    ] = 256,
    json: Json = False,
) -> None:
    """Turn text into memory-mapped token shards; an interrupted run continues.

    \b
    Examples:
      lowmem data prepare ./c4/en --tokenizer ./t5-base --out ./corpus
      lowmem data prepare notes.txt
      lowmem data prepare ./c4 --protocol galore --tokenizer ./t5-base --out ./documents
    """
    from lowmem.cli import data as command

    request = command.Request(
        source, out, tokenizer, text_key, skip_bad, workers, max_tokens, protocol, seq_len
    )
    command.prepare(given, request, as_json=json)


def info(given: Given, folder: Corpus, json: Json = False) -> None:
    """What a corpus holds: tokens, documents, tokenizer, shards."""
    from lowmem.cli import data as command

    command.info(given, folder, as_json=json)


def verify(given: Given, folder: Corpus) -> None:
    """Compare every shard with the sha256 in the manifest."""
    from lowmem.cli import data as command

    command.verify(given, folder)


def show(
    given: Given,
    origin: Annotated[bool, typer.Option("--origin", help="where each value came from")] = False,
    json: Json = False,
) -> None:
    """Print the configuration that these flags, variables and files give.

    \b
    Example:
      lowmem config show --config run.toml --rank 64 --origin
    """
    from lowmem.cli import config as command

    command.show(given, origin=origin, as_json=json)


def check(
    given: Given,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="TOML files")],
) -> None:
    """Check configuration files, each by itself."""
    from lowmem.cli import config as command

    command.check(given, files)


def schema(given: Given) -> None:
    """Print the JSON schema of the configuration, for editors."""
    from lowmem.cli import config as command

    command.schema(given)


RUNS, RESULTS, LOOK = "Runs", "Results", "Data, configuration, machine"
app.command("plan", rich_help_panel=RUNS)(with_settings(plan, SETTINGS, files=True))
app.command("train", rich_help_panel=RUNS)(with_settings(train, SETTINGS, files=True))
_REPRODUCED = [setting for setting in SETTINGS if setting.flag not in ("--scale", "--recipe")]
app.command("reproduce", rich_help_panel=RUNS)(with_settings(reproduce, _REPRODUCED, files=True))
app.command("resume", rich_help_panel=RUNS)(with_settings(resume, named(*CHANGEABLE)))
app.command("eval", rich_help_panel=RUNS)(with_settings(evaluate, named(*EVALUATION)))
app.command("export", rich_help_panel=RUNS)(with_settings(export))
app.command("sample", rich_help_panel=RUNS)(with_settings(sample))
app.command("sweep", rich_help_panel=RUNS)(with_settings(sweep, SETTINGS, files=True))
app.command("compare", rich_help_panel=RESULTS)(with_settings(compare))
app.command("plot", rich_help_panel=RESULTS)(with_settings(plot))
app.command("report", rich_help_panel=RESULTS)(with_settings(report))
app.command("methods", rich_help_panel=LOOK)(with_settings(methods))
app.command("results", rich_help_panel=LOOK)(with_settings(results))
app.command("doctor", rich_help_panel=LOOK)(
    with_settings(doctor, named("--model", "--out", "--method", "--keep"), files=True)
)
data.command("prepare")(with_settings(prepare))
data.command("info")(with_settings(info))
data.command("verify")(with_settings(verify))
config.command("show")(with_settings(show, SETTINGS, files=True))
config.command("check")(with_settings(check))
config.command("schema")(with_settings(schema))
bench.command("kernels")(with_settings(bench_kernels))
bench.command("optimizer")(with_settings(bench_optimizer, named("--model"), files=True))
app.add_typer(bench, name="bench", rich_help_panel=LOOK)
app.add_typer(data, name="data", rich_help_panel=LOOK)
app.add_typer(config, name="config", rich_help_panel=LOOK)
