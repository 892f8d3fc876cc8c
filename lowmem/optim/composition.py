"""What a method is composed of, as text: for `lowmem methods` and for the start of a run."""

from dataclasses import fields, is_dataclass
from typing import Any

from lowmem.optim.method import ByRole


def composition(part: Any) -> dict[str, str]:
    """Part name -> its expression: {"projector": "SVD(rank=128, ...)", "rule": ...}."""
    if not is_dataclass(part):
        return {"method": repr(part)}
    return {field.name: repr(getattr(part, field.name)) for field in fields(part)}


def expression(method: object) -> str:
    """The same in one line: "Projected: SVD(rank=128, ...), Adam(...), ..., on_refresh='keep'"."""
    if not is_dataclass(method):
        return repr(method)
    parts = {field.name: getattr(method, field.name) for field in fields(method)}
    words = [repr(v) if is_dataclass(v) else f"{name}={v!r}" for name, v in parts.items()]
    return f"{type(method).__name__}: {', '.join(words)}"


def by_role(method: ByRole) -> dict[str, dict[str, str]]:
    """Roles -> form and composition of the method they have; equal ones are listed once."""
    if method.embedding is None and method.head is None and method.other == method.matrix:
        parts = {"all weights": method.matrix}
    else:
        given = {"embedding": method.embedding, "head": method.head}
        own = {role: part for role, part in given.items() if part is not None}
        parts = {"attention, mlp": method.matrix, **own, "all others": method.other}
    return {
        role: {"form": type(part).__name__, **composition(part)} for role, part in parts.items()
    }
