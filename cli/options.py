"""The options that several commands share: each defined once, turned into configuration keys.

    app.command("plan")(with_settings(plan, SETTINGS, files=True))   # plan(given, ...)

Only text passes here; values are parsed and checked together by `config/load.py`, so that all
mistakes are reported at once and a flag, a variable and a file are read by the same rules.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem.config.flags import FLAGS

MODEL, MEMORY, OPTIMIZER = "Model and hardware", "Memory", "Optimizer"
DATA, SCHEDULE, CHECKPOINTS, CONFIGURATION = "Data", "Budget and schedule", "Run", "Configuration"


@dataclass(frozen=True)
class Setting:
    """One flag of the configuration: how it is shown in --help. The key stands in FLAGS."""

    flag: str
    form: str
    help: str
    panel: str

    @property
    def key(self) -> str:
        return FLAGS[self.flag]

    @property
    def variable(self) -> str:
        return _variable(self.flag)


@dataclass(frozen=True)
class Given:
    """What the user typed: settings by dotted key, --config files, --set assignments, -q, -v."""

    flags: dict[str, Any]
    files: list[Path]
    assignments: list[str]
    quiet: bool
    verbose: bool = False


SETTINGS = (
    Setting("--model", "NAME|PATH", "a preset such as llama-60m, or a config.json", MODEL),
    Setting("--gpu", "24GB|CARD|auto", "memory or card to plan for; auto measures", MODEL),
    Setting(
        "--others", "SIZE", "what other programs use of the card; 0MiB without a desktop", MODEL
    ),
    Setting("--device", "auto|cpu|cuda", "where to compute", MODEL),
    Setting("--seed", "N", "of weights, data order and rounding (default 0)", MODEL),
    Setting("--update", "MODE", "unfused, fused+subspace, fused or layer-major", MEMORY),
    Setting("--boundaries", "keep|host", "where inputs of blocks wait for backward", MEMORY),
    Setting("--place", "device|host", "where states live between updates", MEMORY),
    Setting("--blocks", "device|host", "layer-major: where weights of blocks live", MEMORY),
    Setting("--states", "FORMAT", "moments as fp32, bf16 or 8bit", MEMORY),
    Setting("--weights", "FORMAT", "weights in memory as fp32, bf16 or int8", MEMORY),
    Setting("--ends", "exact|int8", "embedding and head as floats, or as int8 weights", MEMORY),
    Setting("--sums", "FORMAT", "of gradients: fp32, bf16 or int8, or fp32 on the host", MEMORY),
    Setting("--recompute", "LEVEL", "what blocks keep for backward: keep, attn, full", MEMORY),
    Setting("--logits", "WAY", "keep them for backward, or recompute them: the same bits", MEMORY),
    Setting("--attention", "sdpa|flash-attn", "whose attention kernel", MEMORY),
    Setting("--matmul", "exact|int8|fp8", "products of the linear layers of blocks", MEMORY),
    Setting("--micro-batch", "N", "sequences per forward pass", MEMORY),
    Setting("--method", "NAME", "see `lowmem methods`", OPTIMIZER),
    Setting("--rank", "N|0.25", "of the subspace: a number, or a fraction of a side", OPTIMIZER),
    Setting("--lr", "RATE", "peak learning rate, or step-law; else the method's", OPTIMIZER),
    Setting("--weight-decay", "RATE", "decoupled, per unit of lr; else the method's", OPTIMIZER),
    Setting("--scale", "X", "of a projected step", OPTIMIZER),
    Setting("--gap", "N", "updates between two choices of the subspace", OPTIMIZER),
    Setting("--clip", "X|off", "limit of the gradient norm", OPTIMIZER),
    Setting("--data", "NAME|PATH", "sample, c4, text, JSON lines or shards", DATA),
    Setting("--protocol", "lowmem|galore", "packed text, or the papers' padded documents", DATA),
    Setting("--tokenizer", "PATH|NAME", "a folder, a file or a hub name", DATA),
    Setting("--seq-len", "N", "tokens per sequence", DATA),
    Setting("--updates", "N", "optimizer steps", SCHEDULE),
    Setting("--tokens", "1.1B", "a budget of tokens instead of updates", SCHEDULE),
    Setting("--hours", "48", "a budget of time on a known card instead of updates", SCHEDULE),
    Setting("--batch", "32seq|131k-tokens", "per update", SCHEDULE),
    Setting("--schedule", "KIND", "cosine, linear, constant, wsd or rex", SCHEDULE),
    Setting("--warmup", "N|0.1", "updates, or a fraction of them (default 0.1)", SCHEDULE),
    Setting("--eval-every", "N", "updates between evaluations, 0 = at the end only", SCHEDULE),
    Setting("--eval-tokens", "N", "validation tokens of an evaluation, e.g. 1M", SCHEDULE),
    Setting("--name", "NAME", "of the run's folder", CHECKPOINTS),
    Setting("--out", "PATH", "where runs are kept (default ./runs)", CHECKPOINTS),
    Setting("--save-every", "N", "updates between checkpoints, 0 = at the end only", CHECKPOINTS),
    Setting("--keep", "N", "newest checkpoints to keep (default 2)", CHECKPOINTS),
    Setting("--recipe", "NAME", "published settings below all others", CONFIGURATION),
)
CHANGEABLE = (
    "--gpu",
    "--method",
    "--rank",
    "--states",
    "--lr",
    "--weights",
    "--update",
    "--boundaries",
    "--place",
    "--blocks",
    "--micro-batch",
    "--sums",
    "--recompute",
    "--logits",
    "--clip",
)  # by `lowmem resume`
EVALUATION = ("--data", "--protocol", "--tokenizer", "--seq-len", "--eval-tokens", "--device")

Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]

SWITCHES = (
    ("--skip-bad", "count unreadable lines instead of failing", DATA),
    ("--compile", "torch.compile norms, rotations and gated units of blocks", MEMORY),
)
_CONFIG = Annotated[
    list[Path],
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="a TOML file; may be repeated, the last wins",
        rich_help_panel=CONFIGURATION,
        show_default=False,
    ),
]
_SET = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="any key, e.g. optimizer.betas=[0.9,0.95]",
        rich_help_panel=CONFIGURATION,
        show_default=False,
    ),
]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="errors only")]
_VERBOSE = Annotated[
    bool, typer.Option("--verbose", "-v", help="tracebacks with errors, more figures")
]


def with_settings(
    command: Callable[..., None], settings: Iterable[Setting] = (), *, files: bool = False
) -> Callable[..., None]:
    """`command(given, ...)` with `settings`, -q and -v, and with files also --config and --set.

    typer reads options from a signature; this one is put together instead of being copied.
    """
    settings = list(settings)
    own = list(inspect.signature(command).parameters.values())[1:]
    shared = [_parameter(s.variable, _option(s), None) for s in settings]
    if any(setting.flag == "--data" for setting in settings) and files:  # it trains, or plans to
        shared += [
            _parameter(_variable(flag), _switch(flag, *rest), False) for flag, *rest in SWITCHES
        ]
    if files:
        shared += [
            _parameter("config", _CONFIG, []),
            _parameter("assignments", _SET, []),
        ]
    shared += [_parameter("quiet", _QUIET, False), _parameter("verbose", _VERBOSE, False)]
    names = [parameter.name for parameter in shared]

    def call(**typed: Any) -> None:
        rest = {name: value for name, value in typed.items() if name not in names}
        command(_given(settings, typed), **rest)

    call.__doc__ = command.__doc__
    call.__name__ = command.__name__
    call.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return call


def named(*flags: str) -> list[Setting]:
    """The settings of these flags."""
    return [setting for setting in SETTINGS if setting.flag in flags]


def _given(settings: Iterable[Setting], typed: dict[str, Any]) -> Given:
    flags = {s.key: typed[s.variable] for s in settings if typed[s.variable] is not None}
    flags |= {FLAGS[flag]: True for flag, *_ in SWITCHES if typed.get(_variable(flag))}
    files, assignments = typed.get("config", []), typed.get("assignments", [])
    return Given(flags, files, assignments, typed["quiet"], typed["verbose"])


def _variable(flag: str) -> str:
    return flag[2:].replace("-", "_")


def _switch(flag: str, text: str, panel: str) -> Any:
    return Annotated[bool, typer.Option(flag, help=text, rich_help_panel=panel)]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _option(setting: Setting) -> Any:
    option = typer.Option(
        setting.flag,
        metavar=setting.form,
        help=setting.help,
        rich_help_panel=setting.panel,
        show_default=False,
    )
    return Annotated[str | None, option]
