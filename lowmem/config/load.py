"""Flags, environment and files become one `Config`, and every value knows where it came from.

    load({"optimizer.rank": "64"}, [Path("run.toml")])     # the flag wins over the file

Precedence: flags > LOWMEM_* variables > files (a later one wins) > recipe > built-in defaults.
Everything that is wrong is reported at once, in one ConfigError.
"""

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem.config.flags import ENVIRONMENT, FLAGS, OTHER_VARIABLES
from lowmem.config.problems import (
    Problem,
    config_error,
    must_be,
    schema_of,
    takes_boolean,
    unknown_key,
    wrong_values,
)
from lowmem.config.recipes import find_recipe
from lowmem.config.schema import Config, OptimizerConfig
from lowmem.config.toml import key_lines
from lowmem.errors import ConfigError, nearest, short

_BUDGETS = {"train.updates", "train.tokens", "train.hours"}  # one budget in three forms
_DEEPEST = 16  # tables and lists in one another
_TOO_DEEP = f"is nested deeper than {_DEEPEST} tables"
_LONGEST_INT = 1000  # bits; neither text nor a float holds much more
_LONGEST_TEXT = 4096  # characters, what a path may have


@dataclass(frozen=True)
class Loaded:
    """A configuration, the origin of each of its values by dotted key, and what was odd.

    An origin is "default", "recipe galore-60m", "flag --rank", "environment LOWMEM_RANK" or
    "run.toml:7".
    """

    config: Config
    origins: dict[str, str]
    warnings: list[str]


@dataclass(frozen=True)
class _Value:
    value: Any
    origin: str
    written: str  # the key as the user wrote it


@dataclass
class _Given:
    """What has been given so far, by dotted key."""

    values: dict[str, _Value] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def take(self, source: Iterable[tuple[str, Any, str]]) -> None:
        """Add (key, value, origin) of a stronger source; what contradicts it gives way."""
        new: dict[str, _Value] = {}
        tables: set[str] = set()  # the keys of `new`, and those of the tables around them
        for written, value, origin in source:
            key = _canonical(written)
            if unusable := _unusable(value):
                self.problems.append(Problem(_place(origin), written, unusable))
            elif other := key if key in tables else next(filter(new.get, _parents(key)), None):
                self.problems.append(Problem(_place(origin), written, f"`{other}` is given too"))
            elif schema_of(key) is None:
                self.problems.append(Problem(_place(origin), written, unknown_key(written)))
            else:
                new[key] = _Value(value, origin, written)
                tables |= set(_parents(key))
        kept = {k: v for k, v in self.values.items() if not any(_displaces(n, k) for n in new)}
        self.values = kept | new


def load(
    flags: Mapping[str, Any],
    files: Sequence[Path] = (),
    environ: Mapping[str, str] = os.environ,
    assignments: Sequence[str] = (),
) -> Loaded:
    """The configuration. flags: dotted key -> value, None where not given (text is parsed).

    assignments: "key=value" of --set, the value in TOML. Raises ConfigError with all problems.
    """
    config, given = _read(flags, files, environ, assignments)
    if given.problems:
        raise config_error(given.problems)
    origins = {
        key: given.values[key].origin if key in given.values else "default"
        for key, _ in flatten(config.model_dump())
    }
    return Loaded(config, origins, _odd_variables(environ))


def examine(file: Path) -> tuple[Config, ConfigError | None]:
    """(the configuration of all that is right in a file, what is wrong in it)."""
    config, given = _read({}, [file], {}, ())
    return config, config_error(given.problems) if given.problems else None


def _read(
    flags: Mapping[str, Any],
    files: Sequence[Path],
    environ: Mapping[str, str],
    assignments: Sequence[str],
) -> tuple[Config, _Given]:
    """The configuration of all that is right, and what was given, with all problems."""
    given, problems = _Given(), list[Problem]()
    sources = list(_sources(flags, files, environ, assignments, problems))
    named = [entry for source in sources for entry in source if entry[0] == "recipe"]
    given.take(_from_recipe(named[-1], problems) if named else [])
    for source in sources:
        given.take(source)
    given.problems += problems
    return _validated(given), given


def _sources(
    flags: Mapping[str, Any],
    files: Sequence[Path],
    environ: Mapping[str, str],
    assignments: Sequence[str],
    problems: list[Problem],
) -> Iterator[list[tuple[str, Any, str]]]:
    """Lists of (key, value, origin), the weakest first."""
    named = [Path(environ["LOWMEM_CONFIG"])] if environ.get("LOWMEM_CONFIG") else []
    for path in [*named, *files]:
        yield list(_from_file(path, problems))
    yield [
        (key, _from_text(key, environ[name]), f"environment {name}")
        for name, key in ENVIRONMENT.items()
        if environ.get(name)
    ]
    flag_of = {key: flag for flag, key in FLAGS.items()}
    yield [
        (key, _from_text(key, value), f"flag {flag_of.get(key, key)}")
        for key, value in flags.items()
        if value is not None
    ]
    for assignment in assignments:
        yield list(_from_assignment(assignment, problems))


def _from_recipe(
    named: tuple[str, Any, str], problems: list[Problem]
) -> Iterator[tuple[str, Any, str]]:
    """The settings of the recipe that was named."""
    key, name, origin = named
    try:
        recipe = find_recipe(name)
    except ConfigError as error:
        problems.append(Problem(_place(origin), key, f"{error.why}; {error.fix}"))
        return
    for setting, value in flatten(recipe.settings):
        yield setting, value, f"recipe {recipe.name}"


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty table is a leaf."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, item in value.items():
        yield from flatten(item, f"{path}.{key}" if path else key)


def _canonical(key: str) -> str:
    """`optimizer.gap` is short for `optimizer.options.gap`."""
    head, *rest = key.split(".")
    if head == "optimizer" and rest and rest[0] not in OptimizerConfig.model_fields:
        return ".".join([head, "options", *rest])
    return key


def _displaces(new: str, old: str) -> bool:
    """Whether giving `new` makes `old` void: a parent or child, or the budget in another form."""
    related = old.startswith(new + ".") or new.startswith(old + ".")
    return related or (new != old and {new, old} <= _BUDGETS)


def _place(origin: str) -> str:
    """An origin as the place of a problem: "run.toml:7", "--rank", "LOWMEM_RANK"."""
    return origin.removeprefix("flag ").removeprefix("environment ")


def _from_file(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Any, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(Problem(f"{path}", "", "this file does not exist"))
        return
    except (OSError, ValueError) as error:
        problems.append(Problem(f"{path}", "", f"cannot be read as text: {error}"))
        return
    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        problems.append(Problem(f"{path}", "", f"is not TOML: {error}"))
    except RecursionError:
        problems.append(Problem(f"{path}", "", _TOO_DEEP))
    else:
        if _depth_exceeds(tables, _DEEPEST):
            problems.append(Problem(f"{path}", "", _TOO_DEEP))
            return
        lines = key_lines(text)
        for key, value in flatten(tables):
            if key:  # an empty file is one empty leaf without a name
                yield key, value, f"{path}:{_line(key, lines)}"


def _line(key: str, lines: dict[str, int]) -> int:
    """The line of a key, or of the table or inline table around it."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key, 1)


def _from_assignment(text: str, problems: list[Problem]) -> Iterator[tuple[str, Any, str]]:
    """`key=value`; a value that is no TOML is text, so --set data.source=c4 needs no quotes."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        problems.append(Problem("--set", text, "must be key=value, e.g. optimizer.gap=100"))
        return
    parsed = _toml_or_text(value)
    if _depth_exceeds(parsed, _DEEPEST):
        problems.append(Problem("--set", key.strip(), _TOO_DEEP))
        return
    for name, leaf in flatten(parsed, key.strip()):
        yield name, leaf, f"flag --set {key.strip()}"


def _from_text(key: str, value: Any) -> Any:
    """A flag's value. Options have no type until their method is built, so text is read as TOML."""
    is_option = key.startswith("optimizer.options.") and isinstance(value, str)
    return _toml_or_text(value) if is_option else value


def _toml_or_text(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text.strip()
    return tables["value"] if tables.keys() == {"value"} else text.strip()  # one line, one value


def _depth_exceeds(value: Any, most: int) -> bool:
    """Whether tables and lists are nested deeper than `most`; without recursion."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)


def _unusable(value: Any) -> str:
    """Why no key can have this value: what config.toml could not hold, or no path may contain."""
    match value:
        case list():
            return next(filter(None, map(_unusable, value)), "")
        case dict():
            return next(filter(None, map(_unusable, [*value, *value.values()])), "")
        case int() if value.bit_length() > _LONGEST_INT:
            return f"a whole number of {value.bit_length():,} bits is too large"
        case date() | time():
            return f"{value} is a date or time, which no key takes"
        case str() if len(value) > _LONGEST_TEXT:
            return f"a text of {len(value):,} characters; at most {_LONGEST_TEXT:,} are taken"
        case str() if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"{short(value)} holds NUL or bytes that are no UTF-8"
    return ""


def _parents(key: str) -> Iterator[str]:
    """The keys of the tables around `key`, itself first."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _odd_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for every LOWMEM_ variable that means nothing."""
    known = [*ENVIRONMENT, *OTHER_VARIABLES]
    odd = sorted(name for name in environ if name.startswith("LOWMEM_") and name not in known)
    hints = {name: nearest(name, known) for name in odd}
    return [
        f"{name} means nothing to lowmem" + (hint and f"; {hint}") for name, hint in hints.items()
    ]


def _validated(given: _Given) -> Config:
    """The configuration of the values that are right; for the others problems are added.

    What is wrong is left out and the rest looked at again: whether values suit one another is
    asked only where each is right by itself.
    """
    no_switches = [  # `updates = true` is not 1
        key
        for key, entry in given.values.items()
        if isinstance(entry.value, bool) and not takes_boolean(key)
    ]
    wrong = {key: must_be(key, given.values[key].value) for key in no_switches}
    _add_problems(given, wrong)
    values = _without(wrong, given.values)
    while True:
        try:
            return Config.model_validate(_nested(values))
        except ValidationError as error:
            wrong = wrong_values(error)
        _add_problems(given, wrong)
        left = _without(wrong, values)
        values = left if len(left) < len(values) else {}


def _add_problems(given: _Given, wrong: Mapping[str, str]) -> None:
    """Reasons by dotted key become problems, one for each key as it was written."""
    listed = {problem.key for problem in given.problems}
    for key, reason in wrong.items():
        origin, written = _source_of(key, given.values)
        if written not in listed:
            given.problems.append(Problem(_place(origin), written, reason))


def _without(wrong: Iterable[str], values: Mapping[str, _Value]) -> dict[str, _Value]:
    """The values but those at, in or around the keys; of a key that nobody gave, its section."""
    left = dict(values)
    for key in wrong:
        found = [name for name in values if name == key or _displaces(key, name)]
        section = key.partition(".")[0]
        for name in found or [name for name in values if name.partition(".")[0] == section]:
            left.pop(name, None)
    return left


def _nested(values: Mapping[str, _Value]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, entry in values.items():
        *path, name = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[name] = entry.value
    return tables


def _source_of(key: str, values: Mapping[str, _Value]) -> tuple[str, str]:
    """(origin, key as written) of a value, or the origin of what stands nearest to it."""
    if key in values:
        return values[key].origin, values[key].written
    for around in (key, key.rpartition(".")[0]):
        for name, entry in values.items():
            if name.startswith(around + "."):
                return entry.origin, key
    return "", key
