"""The commands for data, configuration and machine: doctor, bench, data, config."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.options import SETTINGS, Given, Json, named, with_settings

Corpus = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="a prepared corpus", show_default=False)
]


def add_to(app: typer.Typer, panel: str) -> None:
    """The commands of this file, in the order of --help."""
    app.command("doctor", rich_help_panel=panel)(
        with_settings(doctor, named("--model", "--out", "--method", "--keep"), files=True)
    )
    bench = typer.Typer(help="Measure the parts of a training step on this machine.")
    bench.command("kernels")(with_settings(bench_kernels))
    bench.command("optimizer")(with_settings(bench_optimizer, named("--model"), files=True))
    app.add_typer(bench, name="bench", rich_help_panel=panel)
    data = typer.Typer(help="Turn text into token shards, and look at them.")
    data.command("prepare")(with_settings(prepare))
    data.command("info")(with_settings(info))
    data.command("verify")(with_settings(verify))
    app.add_typer(data, name="data", rich_help_panel=panel)
    config = typer.Typer(help="Show, check and describe configurations.")
    config.command("show")(with_settings(show, SETTINGS, files=True))
    config.command("check")(with_settings(check))
    config.command("schema")(with_settings(schema))
    app.add_typer(config, name="config", rich_help_panel=panel)


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
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="PATH|NAME",
            help="a folder, a file or a hub name; auto: the sample's",
        ),
    ] = "auto",
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
