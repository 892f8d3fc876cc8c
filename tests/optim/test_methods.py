"""The list of methods: complete sheets, and arguments that are checked before they are used."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowmem.config.schema import RestConfig
from lowmem.errors import ConfigError
from lowmem.optim.method import ByRole, Dense, Projected
from lowmem.optim.methods import METHODS, MethodSpec, build_method, method_spec
from lowmem.optim.methods.spec import SHEET_ONLY, sheet_problem
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_a_sheet_is_complete(name: str) -> None:
    spec = method_spec(name)
    assert spec.summary.endswith(".")
    assert "Source: " in (spec.build.__doc__ or "")
    assert spec.source
    assert sheet_problem(spec) is None
    for recipe in spec.recipes.values():
        assert 0 < recipe["lr"] < 1
        assert 0 <= recipe.get("weight_decay", 0.0) < 1
        build_method(name, {k: v for k, v in recipe.items() if k not in SHEET_ONLY})


@every_method
def test_every_argument_has_a_default_that_passes_its_own_check(name: str) -> None:
    spec = method_spec(name)
    assert build_method(name, {}) == build_method(name, spec.arguments)


@every_method
def test_a_format_that_does_not_suit_is_refused_with_the_reason(name: str) -> None:
    spec = method_spec(name)
    for states in {"fp32", "bf16", "8bit"} - set(spec.states):
        with pytest.raises(ConfigError, match=f"states = '{states}' does not suit") as caught:
            build_method(name, {"states": states})
        assert caught.value.why == spec.why_states != ""


@every_method
def test_moments_are_never_bf16_by_default(name: str) -> None:
    """Rounded to nearest they would never decay; only the basis follows the weight's format."""
    method = build_method(name, {})
    weight = torch.empty(64, 48, dtype=torch.bfloat16, device="meta")
    for part in (method.matrix, method.other):
        state = part.init(weight, Place(index=0, count=1))
        found = {k for k, v in state.items() if isinstance(v, Tensor) and v.dtype == torch.bfloat16}
        assert all(key.endswith("basis") for key in found)


def test_no_argument_is_hidden_by_a_setting_of_the_configuration() -> None:
    """Keys of [optimizer.rest] that are settings of their own never reach a method."""
    taken = set(RestConfig.model_fields) - {"states"}
    assert not any(taken & spec.arguments.keys() for spec in METHODS.values())


@pytest.mark.parametrize(
    ("parameters", "size"),
    [(1, "60m"), (58e6, "60m"), (1e9, "1b"), (3.0e9, "1b"), (3.01e9, "7b"), (1e13, "7b")],
)
def test_the_recipe_is_that_of_the_nearest_size(parameters: float, size: str) -> None:
    """Nearest by factor: 1.34 and 6.74 billion meet at their geometric mean, 3.005."""
    recipes = {"60m": {"lr": 0.3}, "1b": {"lr": 0.2}, "7b": {"lr": 0.1}}
    spec = MethodSpec(METHODS["adamw"].build, recipes, "")
    assert spec.recipe_size(int(parameters)) == size
    assert spec.recipe(int(parameters)) == recipes[size]
    assert spec.learning_rate(int(parameters)) == recipes[size]["lr"]


def test_one_recipe_may_serve_all_sizes() -> None:
    spec = MethodSpec(METHODS["adamw"].build, {"any": {"lr": 0.3}}, "")
    assert spec.recipe_size(1) == spec.recipe_size(10**13) == "any"


def positional(lr_is_here: float = 1.0) -> ByRole:
    return METHODS["adamw"].build()


def hides_lr(*, lr: float = 1.0) -> ByRole:
    return METHODS["adamw"].build()


def no_roles(*, states: Literal["fp32"] = "fp32") -> ByRole:
    return METHODS["adamw"].build().matrix  # type: ignore[return-value]


ANY = {"any": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("sheet", "problem"),
    [
        (print, "of type builtin_function_or_method, not a MethodSpec"),
        (MethodSpec(positional, ANY, ""), "lr_is_here of its builder is not keyword-only"),
        (MethodSpec(hides_lr, ANY, ""), "argument lr of its builder is a setting"),
        (MethodSpec(METHODS["adamw"].build, {}, ""), "it has no recipe"),
        (MethodSpec(METHODS["adamw"].build, {"2b": {"lr": 1}}, ""), "'2b' is for none of 60m"),
        (MethodSpec(METHODS["adamw"].build, {"1b": {}}, ""), "recipe '1b' has no lr"),
        (MethodSpec(METHODS["adamw"].build, {"1b": {"lr": 1, "gap": 2}}, ""), "sets gap, which"),
        (MethodSpec(no_roles, ANY, ""), "returns Dense, not ByRole"),
    ],
)
def test_what_is_wrong_with_a_sheet_is_told(sheet: object, problem: str) -> None:
    assert problem in (sheet_problem(sheet) or "")


@pytest.mark.parametrize(
    ("name", "fix"), [("galor", "did you mean `galore`?"), ("zzz", "lowmem methods")]
)
def test_an_unknown_method_is_told(name: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.method = '{name}' is unknown") as caught:
        method_spec(name)
    assert caught.value.why == "allowed: " + ", ".join(METHODS)
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("key", "fix"), [("gaps", "did you mean `gap`?"), ("zzz", "lowmem methods galore")]
)
def test_an_unknown_argument_is_told(key: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{key} is unknown to method") as caught:
        build_method("galore", {key: 1})
    assert caught.value.why == "allowed: " + ", ".join(METHODS["galore"].arguments)
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("name", "options", "what", "why"),
    [
        ("galore", {"rank": 0}, "optimizer.rank = 0", "greater than 0"),
        ("galore", {"rank": 0.5}, "optimizer.rank = 0.5", "valid integer"),
        ("galore", {"rank": "many"}, "optimizer.rank = 'many'", "valid integer"),
        ("galore", {"gap": -1}, "optimizer.gap = -1", "greater than 0"),
        ("galore", {"scale": math.nan}, "optimizer.scale = nan", "finite number"),
        ("galore", {"side": "up"}, "optimizer.side = 'up'", "'std', 'reverse_std', 'left'"),
        ("adamw", {"states": "4bit"}, "optimizer.states = '4bit'", "'fp32', 'bf16' or '8bit'"),
        ("adam8bit", {"states": "fp32"}, "optimizer.states = 'fp32'", "only 8bit"),
        ("adamw", {"eps": 0}, "optimizer.eps = 0", "greater than 0"),
        ("adamw", {"eps": math.nan}, "optimizer.eps = nan", "finite number"),
        ("adamw", {"betas": 0.9}, "optimizer.betas = 0.9", "valid tuple"),
        ("adam8bit", {"min_8bit": -1}, "optimizer.min_8bit = -1", "greater than or equal to 0"),
        ("adam8bit", {"floor_codes": "maybe"}, "optimizer.floor_codes = 'maybe'", "boolean"),
    ],
)
def test_a_value_out_of_range_is_told(
    name: str, options: dict[str, Any], what: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_method(name, options)
    assert caught.value.what == f"{what} does not suit method {name!r}"
    assert why in caught.value.why
    assert caught.value.fix == f"lowmem methods {name} shows the defaults"


@given(first=st.floats(), second=st.floats())
def test_betas_lie_in_their_range(first: float, second: float) -> None:
    """Any pair of floats, NaN and infinities too: taken, or refused by the name of the number."""
    bad = [place for place, beta in enumerate((first, second)) if not 0 <= beta < 1]
    if bad:
        with pytest.raises(ConfigError, match=r"optimizer\.betas = "):
            build_method("adamw", {"betas": [first, second]})
    else:
        method = build_method("adamw", {"betas": [first, second]})
        assert isinstance(method.matrix, Dense)
        assert isinstance(method.matrix.rule, Adam)
        assert method.matrix.rule.betas == (first, second)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_galore_keeps_its_released_conventions(states: str) -> None:
    """Float states: bias of the whole step, eps 1e-6. 8-bit: bias inside, eps 1e-8, decay first."""
    method = build_method("galore", {"states": states})
    main, other = projected(method), method.other
    assert isinstance(main.rule, Adam)
    assert isinstance(other, Dense)
    assert (main.rule.bias, main.rule.eps, other.decay_first) == (
        ("inside", 1e-8, True) if states == "8bit" else ("step", 1e-6, False)
    )
    assert other.rule == main.rule
    chosen = projected(build_method("galore", {"states": states, "eps": 1e-4}))
    assert isinstance(chosen.rule, Adam)
    assert chosen.rule.eps == 1e-4


def projected(method: ByRole) -> Projected:
    assert isinstance(method.matrix, Projected)
    return method.matrix
