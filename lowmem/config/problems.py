"""What is wrong with a configuration, in sentences: no validator's jargon reaches a user.

The allowed values come from the JSON schema of `Config`, so a new field needs no text here:
`rank = 0` becomes "must be a whole number of at least 1, a number above 0 and below 1, ...".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from lowmem.config.schema import Config
from lowmem.config.toml import toml_value
from lowmem.errors import ConfigError, nearest, short

Schema = dict[str, Any]
_LINE = re.compile("[0-9]{1,9}")
_SLIP = 10**6  # limits from here on are not what a user needs to hear of
_MOST_LISTED = 30
_LONGEST_KEY, _LONGEST_REASON = 60, 400  # characters


@dataclass(frozen=True)
class Problem:
    """One thing to correct. place: "run.toml:7", "--rank" or "LOWMEM_RANK"; key: as written."""

    place: str
    key: str
    reason: str


def config_error(problems: list[Problem]) -> ConfigError:
    """All problems as one error, aligned."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    places = {problem.place.rpartition(":")[0] for problem in problems}
    where = places.pop() if len(places) == 1 else ""
    problems = sorted(problems, key=_by_line)
    more = "" if len(problems) <= _MOST_LISTED else f"\nand {len(problems) - _MOST_LISTED:,} more"
    problems = problems[:_MOST_LISTED]
    places_shown = [short(problem.place, _LONGEST_REASON) for problem in problems]
    place_width = max(map(len, places_shown))
    keys = [short(problem.key, _LONGEST_KEY) for problem in problems]
    key_width = max(map(len, keys))
    lines = [
        f"{place:{place_width}}  {key:{key_width}}  {short(p.reason, _LONGEST_REASON)}"
        for p, place, key in zip(problems, places_shown, keys, strict=True)
    ]
    return ConfigError(
        f"{count} in {where or 'the configuration'}",
        "\n".join(line.rstrip() for line in lines) + more,
        "correct what is listed; `lowmem config schema` describes every key",
    )


def _by_line(problem: Problem) -> tuple[str, int]:
    """Problems of one file in the order of its lines, the others where they were found."""
    name, _, line = problem.place.rpartition(":")
    return (name, int(line)) if name and _LINE.fullmatch(line) else ("", 0)


def schema_of(key: str) -> Schema | None:
    """The JSON schema of a dotted key, None where the configuration has no such key."""
    found: Schema | None = root_schema()
    for part in key.split("."):
        if found is None:
            return None
        found = next(_children(found, part), None)
    return found


def unknown_key(key: str) -> str:
    """The reason for a key that does not exist, with the one that was probably meant."""
    section, _, name = key.rpartition(".")
    elsewhere = [k for k in known_keys() if k.rpartition(".")[2] == name]
    siblings = [k.rpartition(".")[2] for k in known_keys() if k.rpartition(".")[0] == section]
    if elsewhere:
        hint = f"did you mean `{elsewhere[0]}`?"
    else:
        hint = nearest(name, siblings) if section and siblings else nearest(key, known_keys())
    return f"unknown key; {hint}" if hint else "unknown key"


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of the configuration, sections included."""
    return tuple(_names(root_schema(), ""))


@cache
def root_schema() -> Schema:
    return Config.model_json_schema()


def wrong_values(error: ValidationError, section: str = "") -> dict[str, str]:
    """Dotted key -> reason. The branches of a union become one sentence about their key.

    section: of the configuration, that was validated; "" for all of it.
    """
    reasons: dict[str, str] = {}
    for item in error.errors():
        key = _key_of((section, *item["loc"]) if section else item["loc"])
        if item["type"] == "value_error":  # a sentence of ours, from a validator
            reasons[key] = str(item["ctx"]["error"])
        else:
            reasons.setdefault(key, _sentence(key, item["type"], item["input"]))
    parents = {key[:dot] for key in reasons for dot, letter in enumerate(key) if letter == "."}
    return {key: reason for key, reason in reasons.items() if key not in parents}


def allowed(schema: Schema) -> str:
    """The values that a schema takes: 'a number above 0 or "auto"'."""
    phrases = list(dict.fromkeys(_phrases(schema)))
    return " or ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def must_be(key: str, value: Any) -> str:
    """The sentence about a value that `key` does not take."""
    schema = schema_of(key) or {}
    hint = nearest(value, _choices(schema)) if isinstance(value, str) else ""
    if isinstance(value, int) and value > _SLIP:
        hint = "that is too large"
    return f"{short(_shown(value))} must be {allowed(schema)}" + (f"; {hint}" if hint else "")


def _shown(value: Any) -> str:
    """A value in TOML, or as JSON has it where TOML has none."""
    match value:
        case str() if value:
            return value
        case None:
            return "null"
        case list() | dict() if "None" in repr(value):
            return repr(value)
    return toml_value(value)


def takes_boolean(key: str) -> bool:
    """Whether true and false are values of `key`; a free option takes anything."""
    return any(b.get("type", "boolean") == "boolean" for b in _branches(schema_of(key) or {}))


def _sentence(key: str, kind: str, value: Any) -> str:
    if kind == "missing":
        return f"is missing; must be {allowed(schema_of(key) or {})}"
    return must_be(key, value)


def _key_of(location: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, without the names of union branches in it."""
    parts: list[str] = []
    schema = root_schema()
    for part in location:
        child = next(_children(schema, str(part)), None)
        if child is not None:
            parts.append(str(part))
            schema = child
    return ".".join(parts)


def _branches(schema: Schema) -> Iterator[Schema]:
    """The alternatives of a schema, references followed."""
    if "$ref" in schema:
        yield from _branches(root_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for branch in schema["anyOf"]:
            yield from _branches(branch)
    else:
        yield schema


def _children(schema: Schema, name: str) -> Iterator[Schema]:
    for branch in _branches(schema):
        if not branch:  # anything may stand here: the options of a method
            yield branch
        elif name in branch.get("properties", {}):
            yield branch["properties"][name]
        elif name in branch.get("propertyNames", {"enum": [name]})["enum"]:
            rest = branch.get("additionalProperties", False)
            if rest:
                yield {} if rest is True else rest


def _names(schema: Schema, path: str) -> Iterator[str]:
    for branch in _branches(schema):
        for name, child in branch.get("properties", {}).items():
            key = f"{path}.{name}" if path else name
            yield key
            yield from _names(child, key)


def _choices(schema: Schema) -> list[str]:
    values = [v for b in _branches(schema) for v in b.get("enum", [b.get("const")])]
    return [value for value in values if isinstance(value, str)]


def _phrases(schema: Schema) -> Iterator[str]:
    for branch in _branches(schema):
        match branch:
            case {"enum": values}:
                yield from (toml_value(value) for value in values)
            case {"const": value}:
                yield toml_value(value)
            case {"type": "integer"}:
                yield "a whole number" + _range(branch, whole=True)
            case {"type": "number"}:
                yield "a number" + _range(branch, whole=False)
            case {"type": "string"}:
                yield "text"
            case {"type": "boolean"}:
                yield "true or false"
            case {"type": "array", "prefixItems": items}:
                yield f"[{', '.join(allowed(item) for item in items)}]"
            case {"type": "array"}:
                yield "a list"
            case {"type": "object"}:
                yield "a table"


def _range(branch: Schema, *, whole: bool) -> str:
    limits: dict[str, Any] = {
        "above": branch.get("exclusiveMinimum"),
        "of at least": branch.get("minimum"),
        "below": branch.get("exclusiveMaximum"),
        "at most": branch.get("maximum"),
    }
    if limits["at most"] is not None and limits["at most"] >= _SLIP:
        limits["at most"] = None  # guards against slips; `must_be` tells who meets it
    if whole and limits["above"] is not None:
        limits["of at least"] = limits.pop("above") + 1
    words = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
    return " " + " and ".join(words) if words else ""
