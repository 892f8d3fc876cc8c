"""`lowmem methods`: what there is, what it is composed of, and its arguments."""

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.toml import toml_value
from lowmem.optim.methods import METHODS, MethodSpec, method_spec


def methods(given: Given, name: str | None, *, as_json: bool) -> None:
    """All methods as a table, or one in full."""
    console = Console(quiet=given.quiet)
    if name is None:
        _list(console, as_json=as_json)
    elif as_json:
        console.json({"schema_version": 1, **_record(name, method_spec(name))})
    else:
        _one(console, name, method_spec(name))


def composition(part: Any) -> dict[str, str]:
    """Part name -> its expression: {"projector": "SVD(rank=128, ...)", "rule": ...}."""
    if not is_dataclass(part):
        return {"method": repr(part)}
    return {field.name: repr(getattr(part, field.name)) for field in fields(part)}


def _record(name: str, spec: MethodSpec) -> dict[str, Any]:
    return {
        "name": name,
        "summary": spec.summary,
        "learning_rates": [{"up_to_parameters": _finite(n), "lr": lr} for n, lr in spec.lr],
        "source": spec.source,
        "arguments": spec.arguments,
        "composition": composition(spec.build()),
    }


def _finite(limit: float) -> float | None:
    return None if limit == float("inf") else limit


def _list(console: Console, *, as_json: bool) -> None:
    if as_json:
        records = [_record(name, spec) for name, spec in METHODS.items()]
        console.json({"schema_version": 1, "methods": records})
        return
    rows = [[name, _rates(spec), spec.summary] for name, spec in METHODS.items()]
    console.table(["method", "lr", "summary"], rows)
    console.say("\nlowmem methods NAME shows what one is composed of and its arguments")


def _one(console: Console, name: str, spec: MethodSpec) -> None:
    console.result(inspect.getdoc(spec.build) or name)
    console.result("\nComposed of")
    parts = composition(spec.build())
    console.table(["", ""], [[f"  {part}", expression] for part, expression in parts.items()])
    console.result("\nArguments, in [optimizer] or --set optimizer.NAME=VALUE")
    console.table(["", ""], [[f"  {k}", _default(v)] for k, v in spec.arguments.items()])
    console.result(f"\nLearning rate {_rates(spec)} ({spec.source})")


def _default(value: Any) -> str:
    return "by other settings" if value is None else toml_value(value)


def _rates(spec: MethodSpec) -> str:
    return ", ".join(
        f"{lr:g}" if limit == float("inf") else f"{lr:g} to {limit / 1e9:g} B"
        for limit, lr in spec.lr
    )
