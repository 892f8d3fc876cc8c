"""The list of methods: complete sheets, and arguments that are checked before they are used."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.config.schema import RestConfig
from lowmem.errors import ConfigError
from lowmem.optim.method import Dense, Projected
from lowmem.optim.methods import METHODS, MethodSpec, build_method, method_spec
from lowmem.optim.rules import Adam

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_a_sheet_is_complete(name: str) -> None:
    spec = method_spec(name)
    assert spec.summary.endswith(".")
    assert "Source: " in (spec.build.__doc__ or "")
    assert spec.source
    assert "states" in spec.arguments  # the planner varies it
    limits, rates = zip(*spec.lr, strict=True)
    assert list(limits) == sorted(set(limits))
    assert limits[-1] == math.inf
    assert all(0 < rate < 1 for rate in rates)
    assert list(rates) == sorted(rates, reverse=True)


@every_method
def test_every_argument_has_a_default_that_passes_its_own_check(name: str) -> None:
    spec = method_spec(name)
    assert build_method(name, {}) == build_method(name, spec.arguments)


def test_no_argument_is_hidden_by_a_setting_of_the_configuration() -> None:
    """Keys of [optimizer.rest] that are settings of their own never reach a method."""
    taken = set(RestConfig.model_fields) - {"states"}
    assert not any(taken & spec.arguments.keys() for spec in METHODS.values())


@pytest.mark.parametrize(
    ("parameters", "rate"), [(1, 0.5), (1000, 0.5), (1001, 0.25), (10**13, 0.25)]
)
def test_the_rate_depends_on_the_size_of_the_model(parameters: int, rate: float) -> None:
    spec = MethodSpec(lambda: Dense(Adam()), ((1000, 0.5), (math.inf, 0.25)), "")
    assert spec.learning_rate(parameters) == rate


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
        ("adam8bit", {"states": "fp32"}, "optimizer.states = 'fp32'", "'8bit'"),
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
        assert isinstance(method, Dense)
        assert isinstance(method.rule, Adam)
        assert method.rule.betas == (first, second)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_galore_keeps_its_released_conventions(states: str) -> None:
    """Float states: bias of the whole step, eps 1e-6. 8-bit: bias inside, eps 1e-8, decay first."""
    method = build_method("galore", {"states": states})
    assert isinstance(method, Projected)
    assert isinstance(method.rule, Adam)
    assert (method.rule.bias, method.rule.eps, method.rest.decay_first) == (
        ("inside", 1e-8, True) if states == "8bit" else ("step", 1e-6, False)
    )
    assert method.rest.rule == method.rule
    chosen = build_method("galore", {"states": states, "eps": 1e-4})
    assert isinstance(chosen, Projected)
    assert isinstance(chosen.rule, Adam)
    assert chosen.rule.eps == 1e-4
