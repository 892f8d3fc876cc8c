"""The methods by name. A method is one file; its keyword arguments are its configuration."""

from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from lowmem.errors import ConfigError, nearest, plain, short
from lowmem.optim.method import ByRole
from lowmem.optim.methods import (
    adabelief,
    adahessian,
    adam8bit,
    adam_mini,
    adamp,
    adamw,
    apollo,
    apollo_mini,
    cosmos,
    diffgrad,
    exadam,
    fira,
    frugal,
    galore,
    lion,
    magma,
    muon,
    natural_galore,
    q_apollo,
    q_apollo_mini,
    q_galore,
    racs,
    scale,
    sgd_sai,
    soap,
    sophia,
    spam,
    stable_spam,
)
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.methods.third_party import load, offered, package_of, refused

METHODS: dict[str, MethodSpec] = {  # baselines, subspaces, then what users compare with
    "adamw": adamw.SPEC,
    "adam8bit": adam8bit.SPEC,
    "galore": galore.SPEC,
    "natural_galore": natural_galore.SPEC,
    "q_galore": q_galore.SPEC,
    "fira": fira.SPEC,
    "apollo": apollo.SPEC,
    "apollo_mini": apollo_mini.SPEC,
    "q_apollo": q_apollo.SPEC,
    "q_apollo_mini": q_apollo_mini.SPEC,
    "frugal": frugal.SPEC,
    "cosmos": cosmos.SPEC,
    "muon": muon.SPEC,
    "soap": soap.SPEC,
    "lion": lion.SPEC,
    "sgd_sai": sgd_sai.SPEC,
    "scale": scale.SPEC,
    "racs": racs.SPEC,
    "adam_mini": adam_mini.SPEC,
    "spam": spam.SPEC,
    "stable_spam": stable_spam.SPEC,
    "magma": magma.SPEC,
    "adabelief": adabelief.SPEC,
    "adamp": adamp.SPEC,
    "diffgrad": diffgrad.SPEC,
    "exadam": exadam.SPEC,
    "sophia": sophia.SPEC,
    "adahessian": adahessian.SPEC,
}


def method_names() -> list[str]:
    """Our own methods, then those of other packages; nothing is imported for them."""
    return [*METHODS, *offered(METHODS)]


def method_spec(name: str, section: str = "optimizer") -> MethodSpec:
    """The method of that name. ConfigError: there is none, with the nearest, or it is broken."""
    if name in METHODS:
        return METHODS[name]
    others = offered(METHODS)
    if name in others:
        return load(others[name])
    clashes = [entry for entry in refused(METHODS) if entry.name == name]
    if clashes:
        raise ConfigError(
            f"{section}.method = {name!r} is ambiguous",
            "offered by " + ", ".join(map(package_of, clashes)),
            "uninstall all but one of them",
        )
    names = method_names()
    raise ConfigError(
        f"{section}.method = {short(name)!r} is unknown",
        f"allowed: {', '.join(names)}",
        nearest(name, names) or "lowmem methods",
    )


def build_method(name: str, options: dict[str, Any], section: str = "optimizer") -> ByRole:
    """The method with these arguments, checked; ConfigError names the argument and its range.

    section: of the configuration, for the message.
    """
    spec = method_spec(name, section)
    for key, value in options.items():
        if key == "states" and spec.why_states and value not in spec.states:
            raise _unsuitable(section, key, value, name, spec.why_states)
        if key not in spec.arguments:
            raise ConfigError(
                f"{section}.{key} is unknown to method {name!r}",
                f"allowed: {', '.join(spec.arguments)}",
                nearest(key, spec.arguments) or f"lowmem methods {name}",
            )
        if isinstance(value, bool) and not isinstance(spec.arguments[key], bool):
            raise _unsuitable(section, key, value, name, "a number or a word, not true or false")
    try:
        return _checked(spec.build)(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        raise _unsuitable(section, key, options[key], name, plain(problem["msg"])) from None


@cache
def _checked(build: Callable[..., ByRole]) -> Callable[..., ByRole]:
    """`build` with its arguments checked; making that takes longer than a call of it."""
    return validate_call(config=ConfigDict(allow_inf_nan=False))(build)


def _unsuitable(section: str, key: str, value: Any, method: str, why: str) -> ConfigError:
    return ConfigError(
        f"{section}.{key} = {short(repr(value))} does not suit method {method!r}",
        why,
        f"lowmem methods {method} shows the defaults",
    )
