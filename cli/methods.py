"""`lowmem methods`: what there is, what it costs, what it is composed of, and its arguments."""

import inspect
import re
from functools import cache
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.presets import read_preset
from lowmem.config.problems import allowed
from lowmem.config.schema import Config, ModelConfig, OptimizerConfig
from lowmem.config.toml import toml_value
from lowmem.errors import ConfigError
from lowmem.kernels.grouped_weight import Weight
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.composition import by_role
from lowmem.optim.method import ByRole
from lowmem.optim.methods import METHODS, MethodSpec, method_names, method_spec
from lowmem.optim.methods.spec import SHEET_ONLY
from lowmem.optim.methods.third_party import package_of, refused
from lowmem.planner.candidates import OWN, Kind, families
from lowmem.planner.ways import curvatures, modes

_FORMATS = ("fp32", "bf16", "8bit")
_LETTERS = {"unfused": "U", "fused+subspace": "S", "fused": "F", "layer-major": "L"}
_COMPARED = "1b"  # the size at which the list compares bytes
_STATED = ("alpha", "scale")  # easily confused, so always shown beside a recipe


def methods(given: Given, name: str | None, *, as_json: bool) -> None:
    """All methods as a table, or one in full."""
    console = Console(quiet=given.quiet)
    if name is None:
        _list(console, as_json=as_json)
    elif as_json:
        console.json({"schema_version": 1, **_record(name, method_spec(name))})
    else:
        _one(console, name, method_spec(name))


def state_bytes(name: str, size: str) -> dict[str, float]:
    """Format of the moments -> state bytes per parameter of the LLaMA of that size.

    By the settings of the method's recipe for it and bf16 weights, from the method's own `init`.
    """
    model = read_preset(f"llama-{size}")
    found = _kinds(name, model)
    return {kind.states: _state_bytes(kind, model) / model.parameters for kind in found}


def _state_bytes(kind: Kind, model: ModelConfig) -> int:
    """Of the ends and one block for each of the model's; whole where blocks differ."""
    sizes = _sizes(kind, model, blocks=2)
    first, second = (sum(v for k, v in sizes.items() if f".layers.{i}." in k) for i in (0, 1))
    if first == second:
        return sum(sizes.values()) + (model.num_hidden_layers - 2) * second
    return sum(_sizes(kind, model, model.num_hidden_layers).values())


def _sizes(kind: Kind, model: ModelConfig, blocks: int) -> dict[str, int]:
    """Bytes of every state tensor of a model with so many blocks, when they are most."""
    weights, roles = _meta_weights(model.model_copy(update={"num_hidden_layers": blocks}))
    optimizer = build_optimizer(
        kind.optimizer(OptimizerConfig(), model.parameters),
        weights,
        roles,
        mode="unfused",
        seed=0,
        head_dim=model.head_dim,
    )
    hold_worst_window(optimizer)
    return {key: value.nbytes for key, value in optimizer.state_tensors()}


@cache
def _meta_weights(model: ModelConfig) -> tuple[dict[str, Weight], dict[str, str]]:
    """(name -> weight, name -> role)."""
    llama = Llama(model, dtype=torch.bfloat16, device="meta", attention="cpu")
    return llama.weights(), llama.roles()


def _kinds(name: str, model: ModelConfig) -> list[Kind]:
    """The method in every format, of its recipe's rank."""
    given = [{"states": states} for states in method_spec(name).states] or [{}]
    return [families(_configured(name, **g), model)[0].best for g in given]


def _configured(name: str, **settings: Any) -> Config:
    return Config(optimizer=OptimizerConfig(method=name, **settings))


def _record(name: str, spec: MethodSpec) -> dict[str, Any]:
    return {
        "name": name,
        "summary": spec.summary,
        "source": _paper(spec),
        "recipes": {size: dict(recipe) for size, recipe in spec.recipes.items()},
        "recipes_source": spec.source,
        "arguments": spec.arguments,
        "composition": by_role(spec.build()),
        "updates": _updates(name),
        "state_bytes_per_parameter": {
            f"llama-{size}": state_bytes(name, size)
            for size in (_COMPARED, *spec.recipes)
            if size != "any"
        },
    }


def _updates(name: str) -> list[str]:
    """The update modes that suit a method."""
    kind = families(_configured(name), read_preset(f"llama-{_COMPARED}"))[0].best
    config = _configured(name)
    layer_major = [] if curvatures(kind, config.optimizer) else ["layer-major"]
    return [*modes(config, kind, rows=1), *layer_major]


def _paper(spec: MethodSpec) -> str | None:
    """The arXiv number of the method, None where its docstring names none."""
    _, _, source = (inspect.getdoc(spec.build) or "").partition("Source:")
    found = re.search(r"\d{4}\.\d{4,5}", source)
    return found[0] if found else None


def _list(console: Console, *, as_json: bool) -> None:
    usable, broken = _all()
    if as_json:
        records = [_record(name, spec) for name, spec in usable.items()]
        console.json({"schema_version": 1, "methods": records, "unusable": broken})
        return
    columns = ["method", *(f">{name}" for name in _FORMATS), "updates", "arXiv", "summary"]
    console.table(columns, [_row(name, spec) for name, spec in usable.items()])
    for problem in broken:
        console.result(problem)
    console.say(
        f"\nfp32, bf16, 8bit: bytes of state per parameter of llama-{_COMPARED} with such moments\n"
        "updates: U unfused, S fused+subspace, F fused, L layer-major\n"
        "lowmem methods NAME shows formula, composition, arguments and recipes"
    )


def _all() -> tuple[dict[str, MethodSpec], list[str]]:
    """(what can be used, a line for every method of another package that cannot)."""
    usable, broken = {}, []
    for name in method_names():
        try:
            usable[name] = method_spec(name)
        except ConfigError as error:
            broken.append(f"{error.what}: {error.why}")
    broken += [
        f"method {entry.name!r} of {package_of(entry)} is refused: {reason}"
        for entry, reason in refused(METHODS).items()
    ]
    return usable, broken


def _row(name: str, spec: MethodSpec) -> list[str]:
    costs = state_bytes(name, _COMPARED)
    if OWN in costs:
        costs = {"fp32": costs[OWN]}
    bytes_per_parameter = [f"{costs[f]:.2f}" if f in costs else "-" for f in _FORMATS]
    suited = _updates(name)
    updates = " ".join(letter if mode in suited else " " for mode, letter in _LETTERS.items())
    summary = (spec.summary.partition(": ")[2] or spec.summary).rstrip(".")
    return [name, *bytes_per_parameter, updates, _paper(spec) or "-", summary]


def _one(console: Console, name: str, spec: MethodSpec) -> None:
    console.result(inspect.getdoc(spec.build) or name)
    console.result("\nComposed of")
    rows = [
        [f"  {role}" if part == "form" else "", "" if part == "form" else part, expression]
        for role, parts in by_role(spec.build()).items()
        for part, expression in parts.items()
    ]
    console.table(["", "", ""], rows)
    console.result("\nArguments, in [optimizer] or --set optimizer.NAME=VALUE")
    arguments = [[f"  {k}", _default(v), _allowed(spec, k)] for k, v in spec.arguments.items()]
    console.table(["  name", "default", "allowed"], arguments)
    console.result(f"\nRecipes ({spec.source})")
    console.table(*_recipes(name, spec))
    console.result(f"  {', '.join(_formats(spec))}: bytes of state per parameter")
    console.result(f"\nUpdate modes: {', '.join(_updates(name))}")


def _recipes(name: str, spec: MethodSpec) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): the sheet's settings and state bytes per parameter, by size."""
    given = [key for recipe in spec.recipes.values() for key in recipe]
    settings = list(dict.fromkeys([*given, *(k for k in _STATED if k in spec.arguments)]))
    formats = _formats(spec)
    rows = []
    for size, recipe in spec.recipes.items():
        built = spec.build(**{k: v for k, v in recipe.items() if k not in SHEET_ONLY})
        values = [
            recipe[key] if key in recipe else _otherwise(spec, built, key) for key in settings
        ]
        costs = state_bytes(name, size.replace("any", _COMPARED))
        rows.append(
            [f"  {size}", *map(_default, values), *(f"{cost:.2f}" for cost in costs.values())]
        )
    return ["  size", *(f">{key}" for key in [*settings, *formats])], rows


def _otherwise(spec: MethodSpec, built: ByRole, setting: str) -> Any:
    """A setting that a recipe leaves out: its default, or what the lift makes of the others."""
    default = 0.0 if setting == "weight_decay" else spec.arguments[setting]
    lift = getattr(built.matrix, "lift", None)
    return getattr(lift, setting, None) if default is None else default


def _formats(spec: MethodSpec) -> list[str]:
    return list(spec.states) or ["state"]


def _default(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "by other settings" if value is None else toml_value(value)


def _allowed(spec: MethodSpec, argument: str) -> str:
    """What an argument may be, in words."""
    hint = get_type_hints(spec.build, include_extras=True)[argument]
    return allowed(TypeAdapter(hint).json_schema())
