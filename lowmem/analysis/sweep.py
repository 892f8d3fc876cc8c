"""What a sweep tries: grids of settings times seeds, each trial an ordinary run.

seeds = 3                                  # 0, 1 and 2; or a list of them

[settings]                                 # of every trial, as in a configuration file
model = "llama-60m"
train.updates = 2000

[[grid]]                                   # everything in a grid with everything else in it
method = ["galore", "fira"]
rank = [64, 128]
lr = [0.005, 0.01]

[[grid]]
method = "adamw"
lr = [0.001, 0.003]
"""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lowmem.config.flags import FLAGS
from lowmem.config.load import flatten
from lowmem.errors import ConfigError, nearest, short

SWEPT = ("--method", "--lr", "--rank")  # flags that may list several values
MOST = 1000  # trials; more is a slip
_KEYS = ("seeds", "settings", "grid")
_NO_NAME = re.compile(r"[^A-Za-z0-9.+-]+")
METHOD, RANK, SEED = (FLAGS[flag] for flag in ("--method", "--rank", "--seed"))


@dataclass(frozen=True)
class Request:
    """settings, grids: dotted keys. Every grid is a cross product; seeds are tried with each."""

    seeds: list[int]
    settings: dict[str, Any]
    grids: list[dict[str, list[Any]]]


@dataclass(frozen=True)
class Trial:
    """One run: its folder's name, and what it adds to the settings of all, by dotted key."""

    name: str
    varied: dict[str, Any]


def read_request(path: Path) -> Request:
    """The sweep in a TOML file. ConfigError: anything in it that is no sweep."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "it describes a sweep", "docs/compare.md"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML", short(str(error), 200), "") from None
    unknown = next((key for key in tables if key not in _KEYS), None)
    if unknown is not None:
        raise _wrong(path, unknown, f"a sweep has {', '.join(_KEYS)}", nearest(unknown, _KEYS))
    settings = tables.get("settings", {})
    if not isinstance(settings, dict):
        raise _wrong(path, "settings", "a table of settings, as in a configuration file")
    grids = tables.get("grid", [{}])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise _wrong(path, "grid", "tables, each with the heading [[grid]]")
    return Request(
        seeds=seeds_of(tables.get("seeds", 1), f"{path}: seeds"),
        settings=dict(flatten(settings)) if settings else {},
        grids=[dict(_axes(path, grid)) for grid in grids],
    )


def requested(flags: Mapping[str, Any], seeds: str | None) -> Request:
    """The sweep of a command line, where --method, --lr and --rank may list several values."""
    grid = {}
    for key in (FLAGS[flag] for flag in SWEPT):
        if key in flags:
            grid[key] = [part.strip() for part in str(flags[key]).split(",")]
            if "" in grid[key]:
                raise ConfigError(
                    f"{key} = {flags[key]!r} has an empty place",
                    "it is a list of values with commas between them",
                    "--lr 0.001,0.003",
                )
    rest = {key: value for key, value in flags.items() if key not in grid}
    return Request(seeds_of(seeds or "1", "--seeds"), rest, [grid])


def seeds_of(told: Any, where: str) -> list[int]:
    """Seeds 0 to n-1 of a number n; or those that are listed, "1,5,9" or [1, 5, 9]."""
    several = told.split(",") if isinstance(told, str) and "," in told else told
    try:
        if isinstance(several, list):
            seeds = [_whole(seed) for seed in several]
        else:
            seeds = list(range(min(_whole(several), MOST + 1)))
    except (ValueError, TypeError):
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"{where} = {told!r} is no number of seeds and no list of different seeds",
            "3 means the seeds 0, 1 and 2",
            f"{where.split(' = ')[0]} 3, or 0,1,2",
        )
    return seeds


def _whole(value: Any) -> int:
    if isinstance(value, bool | float):
        raise ValueError
    return int(value)


def _axes(path: Path, grid: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(dotted key, values) of a grid; `lr` is short for the key of --lr, one value for a list."""
    for key, value in flatten(grid) if grid else []:
        if value in ([], {}):
            raise _wrong(path, f"grid.{key}", "a value or a list of values")
        head, dot, rest = key.partition(".")
        known = FLAGS.get(f"--{head.replace('_', '-')}", head)
        yield f"{known}{dot}{rest}", value if isinstance(value, list) else [value]


def _wrong(path: Path, key: str, must: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{path}: `{key}` must be {must}", hint, "docs/compare.md shows a sweep")


def trials(request: Request, takes_rank: Callable[[str], bool]) -> list[Trial]:
    """Every trial once, by grid, setting and seed. ConfigError: too many, or a key given twice.

    takes_rank: whether a method has a rank; one without is tried once, not with every rank.
    """
    found: dict[str, Trial] = {}
    for grid in request.grids:
        twice = next((key for key in grid if key in request.settings or key == SEED), None)
        if twice is not None:
            where = "given for all trials and varied" if twice != SEED else "varied"
            raise ConfigError(
                f"{twice} is {where} in a grid",
                "a setting is the same in every trial or listed in a grid; seeds are `seeds`",
                f"leave {twice} out of the grid, or out of the settings",
            )
        for values in product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            method = varied.get(METHOD, request.settings.get(METHOD))
            if isinstance(method, str) and not takes_rank(method):
                varied = {k: v for k, v in varied.items() if not f"{k}.".startswith(f"{RANK}.")}
            if len(found) > MOST:
                raise ConfigError(
                    f"the sweep has more than {MOST:,} trials",
                    "every combination in a grid is tried with every seed",
                    "fewer values, or several [[grid]] that hold less",
                )
            for seed in request.seeds:
                trial = _trial(varied | {SEED: seed})
                if found.setdefault(trial.name, trial) != trial:
                    raise ConfigError(
                        f"two trials would be called {trial.name}",
                        f"{trial.varied} and {found[trial.name].varied}",
                        "run them as two sweeps, each with its own --name",
                    )
    return list(found.values())


def _trial(varied: dict[str, Any]) -> Trial:
    """Named after everything in its grid, so that a sweep can grow: "galore-lr0.01-seed0"."""
    words: list[str] = []
    for key, value in varied.items():
        told = _NO_NAME.sub("_", str(value))
        if key == METHOD:
            words.insert(0, told)
        else:
            words.append(f"{key.rpartition('.')[2]}{told}")
    return Trial("-".join(words), varied)
