"""A method's sheet: how it is built, and the settings that its authors used at each model size."""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import validate_call

from lowmem.optim.method import ByRole

SHEET_ONLY = ("lr", "weight_decay")
"""Settings of a recipe in a sheet that are no arguments of its method."""

RESERVED = ("method", "lr", "weight_decay", "rest", "options")
"""Settings of [optimizer] that never reach a method: no argument may have such a name."""

SIZES = {  # parameters of the models that papers report
    "60m": 58e6,
    "130m": 134e6,
    "350m": 368e6,
    "1b": 1.34e9,
    "3b": 2.7e9,
    "7b": 6.74e9,
    "13b": 13e9,
}


@dataclass(frozen=True)
class MethodSpec:
    """A method and what its sheet says of it.

    build: keyword arguments -> ByRole. recipes: size -> settings, "lr" always among them; "any"
    where the sources name one for all. source: of the recipes. why_states: the reason, where
    `states` has not all formats.
    """

    build: Callable[..., ByRole]
    recipes: Mapping[str, Mapping[str, Any]]
    source: str
    why_states: str = ""

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Argument names and their defaults."""
        return {k: p.default for k, p in inspect.signature(self.build).parameters.items()}

    @property
    def states(self) -> tuple[str, ...]:
        """The formats that its moments may have; none where it keeps no choice."""
        allowed = typing.get_args(typing.get_type_hints(self.build).get("states"))
        return tuple(name for name in allowed if isinstance(name, str))

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").partition("\n")[0]

    def recipe_size(self, parameters: int) -> str:
        """The size, of those that the sources name, nearest to a model's; or "any"."""
        if "any" in self.recipes:
            return "any"
        return min(self.recipes, key=lambda size: abs(math.log(parameters / SIZES[size])))

    def recipe(self, parameters: int) -> dict[str, Any]:
        """The settings for that size."""
        return dict(self.recipes[self.recipe_size(parameters)])

    def learning_rate(self, parameters: int) -> float:
        """The peak learning rate for a model of that size."""
        return float(self.recipe(parameters)["lr"])

    def weight_decay(self, parameters: int) -> float:
        """The decay for a model of that size; 0 where the sheet has none."""
        return float(self.recipe(parameters).get("weight_decay", 0.0))


def sheet_problem(sheet: object) -> str | None:
    """What makes an object unusable as a method's sheet, in words; None where nothing does."""
    if not isinstance(sheet, MethodSpec):
        return f"it is of type {type(sheet).__name__}, not a MethodSpec"
    for name, parameter in inspect.signature(sheet.build).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            return f"argument {name} of its builder is not keyword-only with a default"
        if name in RESERVED:
            return f"argument {name} of its builder is a setting of [optimizer] itself"
    if not sheet.recipes:
        return "it has no recipe"
    for size, recipe in sheet.recipes.items():
        if size != "any" and size not in SIZES:
            return f"its recipe {size!r} is for none of {', '.join(SIZES)} or any"
        if "lr" not in recipe:
            return f"its recipe {size!r} has no lr"
        unknown = [key for key in recipe if key not in (*SHEET_ONLY, *sheet.arguments)]
        if unknown:
            return f"its recipe {size!r} sets {unknown[0]}, which its builder does not take"
    built = validate_call(sheet.build)()
    if not isinstance(built, ByRole):
        return f"its builder returns {type(built).__name__}, not ByRole"
    return None
