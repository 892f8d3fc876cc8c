"""The methods by name. A method is one file; its keyword arguments are its configuration."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from lowmem.errors import ConfigError, nearest
from lowmem.optim.method import Method
from lowmem.optim.methods.adam8bit import adam8bit
from lowmem.optim.methods.adamw import adamw
from lowmem.optim.methods.galore import galore


@dataclass(frozen=True)
class MethodSpec:
    """A method and what its sheet says of it.

    build: keyword arguments -> Method. lr: (up to this many parameters, peak learning rate), in
    ascending order, the last one for all larger models. source: of that learning rate.
    """

    build: Callable[..., Method]
    lr: tuple[tuple[float, float], ...]
    source: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Argument names and their defaults."""
        return {k: p.default for k, p in inspect.signature(self.build).parameters.items()}

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").partition("\n")[0]

    def learning_rate(self, parameters: int) -> float:
        """The peak learning rate for a model of that size."""
        return next(lr for limit, lr in self.lr if parameters <= limit)


_ANY = float("inf")
_CHECKED = validate_call(config=ConfigDict(allow_inf_nan=False))

METHODS: dict[str, MethodSpec] = {
    "adamw": MethodSpec(
        adamw, ((3e9, 1e-3), (_ANY, 3e-4)), "arXiv:2403.03507 (tuned grid); 7B as LLaMA"
    ),
    "adam8bit": MethodSpec(
        adam8bit, ((3e9, 1e-3), (_ANY, 3e-4)), "as adamw: arXiv:2110.02861 changes no setting"
    ),
    "galore": MethodSpec(galore, ((3e9, 1e-2), (_ANY, 5e-3)), "arXiv:2403.03507, released scripts"),
}


def method_spec(name: str, section: str = "optimizer") -> MethodSpec:
    """The method of that name; ConfigError with the nearest one otherwise."""
    if name not in METHODS:
        raise ConfigError(
            f"{section}.method = {name!r} is unknown",
            f"allowed: {', '.join(METHODS)}",
            nearest(name, METHODS) or "lowmem methods",
        )
    return METHODS[name]


def build_method(name: str, options: dict[str, Any], section: str = "optimizer") -> Method:
    """The method with these arguments, checked; ConfigError names the argument and its range.

    section: of the configuration, for the message.
    """
    spec = method_spec(name, section)
    for key, value in options.items():
        if key not in spec.arguments:
            raise ConfigError(
                f"{section}.{key} is unknown to method {name!r}",
                f"allowed: {', '.join(spec.arguments)}",
                nearest(key, spec.arguments) or f"lowmem methods {name}",
            )
        if isinstance(value, bool) and not isinstance(spec.arguments[key], bool):
            raise _unsuitable(section, key, value, name, "a number or a word, not true or false")
    try:
        return _CHECKED(spec.build)(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        raise _unsuitable(section, key, options[key], name, problem["msg"]) from None


def _unsuitable(section: str, key: str, value: Any, method: str, why: str) -> ConfigError:
    return ConfigError(
        f"{section}.{key} = {value!r} does not suit method {method!r}",
        why,
        f"lowmem methods {method} shows the defaults",
    )
