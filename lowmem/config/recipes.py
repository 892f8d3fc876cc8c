"""Recipes: the settings of a publication's runs, by name (configs/recipes/*.toml).

    galore.toml, [all] and ["60m"]  over  [c4] of protocols.toml, and its [c4.60m]   galore-60m
    the same, ["1b"] and ["1b-script"]                             galore-1b, galore-1b-script

A file is a method; its sections are its recipes, and what stands in [all] is said once. What all
runs of a benchmark share stands in configs/protocols.toml, how long they are in
configs/quality.toml beside the results. A recipe is the weakest source of settings: see `load.py`.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lowmem.errors import ConfigError, nearest, short

Settings = dict[str, Any]

_ABOUT = ("protocol", "published", "variant", "note", "source")
_ABOUT_DEPARTURES = ("differs", "differs_with", "counts_right")
"""Keys of a section that are no settings of a run."""


@dataclass(frozen=True)
class Recipe:
    """settings: nested tables of the configuration. size: of the model, e.g. "60m".

    protocol: of configs/quality.toml. published: the table whose row is to be met; None: no
    publication has one. variant: of that row. differs: what of the published run lowmem does not
    do. note: what a reader should know. counts_right: its perplexity is not too low
    (docs/reproduce.md).
    """

    name: str
    size: str
    protocol: str
    settings: Settings
    source: str
    published: str | None
    variant: str | None
    note: str
    differs: tuple[str, ...]
    counts_right: bool

    @property
    def method(self) -> str:
        return str(self.settings["optimizer"]["method"])


def find_recipe(name: object) -> Recipe:
    """The recipe of that name; "_" may stand for "-". ConfigError: there is none."""
    wanted = name.replace("_", "-") if isinstance(name, str) else name
    for recipe in recipes():
        if recipe.name == wanted:
            return recipe
    names = [recipe.name for recipe in recipes()]
    shown = short(repr(name))
    raise ConfigError(
        f"there is no recipe {shown}",
        f"{shown} is none of the {len(names)} recipes",
        nearest(str(wanted), names) or "lowmem reproduce list names them",
    )


@cache
def recipes() -> tuple[Recipe, ...]:
    """Every recipe, by method and in the order of its file."""
    folder = files("lowmem") / "configs" / "recipes"
    found = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return tuple(
        recipe
        for name in found
        for recipe in _of_file(
            name.removesuffix(".toml"),
            tomllib.loads((folder / name).read_text(encoding="utf-8")),
        )
    )


def _of_file(stem: str, tables: Mapping[str, Any]) -> Iterator[Recipe]:
    for section, own in tables.items():
        if section != "all":
            table = _over(tables["all"], own)
            yield _recipe(f"{stem}-{section}".replace("_", "-"), section.partition("-")[0], table)


def _recipe(name: str, size: str, table: Settings) -> Recipe:
    protocol = str(table["protocol"])
    base = _shared(protocol, size)
    settings = _over(base, {"model": f"llama-{size}"})
    updates = _read("quality.toml")["protocols"][protocol].get("updates", {}).get(size)
    if updates is not None:
        settings = _over(settings, {"train": {"updates": updates}})
    settings = _over(settings, table)
    departures = {key: settings.pop(key) for key in _ABOUT_DEPARTURES if key in settings}
    settings = {key: value for key, value in settings.items() if key not in _ABOUT}
    return Recipe(
        name,
        size,
        protocol,
        settings,
        table["source"],
        table.get("published") or None,  # "" where [all] names one
        table.get("variant"),
        table.get("note", ""),
        (
            *base.get("differs", []),
            *table.get("differs", []),
            *_that_apply(departures.get("differs_with", {}), settings),
        ),
        departures.get("counts_right", False),
    )


def _that_apply(differs_with: Mapping[str, str], settings: Settings) -> Iterator[str]:
    """The sentences whose "KEY = VALUE" is a setting; a number is written as in Python."""
    for setting, sentence in differs_with.items():
        key, _, value = setting.partition(" = ")
        at: Any = settings
        for name in key.split("."):
            at = at.get(name) if isinstance(at, dict) else None
        if str(at) == value:
            yield sentence


def _shared(protocol: str, size: str) -> Settings:
    """What configs/protocols.toml says of runs of that size."""
    table = _read("protocols.toml")[protocol]
    common = {
        key: value for key, value in table.items() if key not in _read("quality.toml")["sizes"]
    }
    below = _shared(common.pop("extends"), size) if "extends" in common else {}
    return _over(below, _over(common, table.get(size, {})))


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Tables joined; what stands in `above` wins."""
    joined = dict(below)
    for key, value in above.items():
        old = joined.get(key)
        joined[key] = (
            _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return joined


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files("lowmem") / "configs" / name).read_text(encoding="utf-8"))
