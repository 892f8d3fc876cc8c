"""TOML, the part that the standard library lacks: writing it, and the line of a key.

to_toml(config)            -> the text of runs/NAME/config.toml, which `load` reads back equal
key_lines("[a]\nb = 1\n")  -> {"a": 1, "a.b": 2}
"""

import json
import re
from typing import Any

from lowmem.config.schema import Config

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_NAME = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_PATH = rf"{_NAME}(?:\s*\.\s*{_NAME})*"
_TABLE = re.compile(rf"\s*\[\s*({_PATH})\s*\]")
_KEY = re.compile(rf"\s*({_PATH})\s*=")


def to_toml(config: Config) -> str:
    """The whole configuration as TOML. Keys without a value (None) are left out: TOML has none."""
    return "\n".join(_table_lines(config.model_dump(), "")).lstrip("\n") + "\n"


def toml_value(value: Any) -> str:
    """`value` as it stands after the equals sign; tables become inline tables."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case dict():
            items = (f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None)
            return "{" + ", ".join(items) + "}"
    raise TypeError(f"{value!r} of type {type(value).__name__} has no form in TOML")


def key_lines(text: str) -> dict[str, int]:
    """Dotted key -> line number (from 1), for tables and for keys at the start of a line.

    A scan, not a parser: it serves messages, and `tomllib` has accepted the text before.
    """
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _TABLE.match(line):
            table = _dotted(header[1])
            lines.setdefault(table, number)
        elif entry := _KEY.match(line):
            key = _dotted(entry[1])
            lines.setdefault(f"{table}.{key}" if table else key, number)
    return lines


def _table_lines(table: dict[str, Any], path: str) -> list[str]:
    """Plain values first, because after a [table] line every key belongs to that table."""
    given = {key: value for key, value in table.items() if value is not None}
    plain = {key: value for key, value in given.items() if not isinstance(value, dict)}
    lines = [f"{_key(key)} = {toml_value(value)}" for key, value in plain.items()]
    if path and (lines or not given):
        lines = ["", f"[{path}]", *lines]
    for key, value in given.items():
        if key not in plain:
            lines += _table_lines(value, f"{path}.{_key(key)}" if path else _key(key))
    return lines


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else toml_value(key)


def _dotted(path: str) -> str:
    return ".".join(name.strip("\"'") for name in re.findall(_NAME, path))
