"""Which parameter gets which method: decided by its role, never by its shape or its name.

`model/llama.py` publishes the roles. Matrices of attention and MLP get the method itself; the
rest (embedding, head, norms, biases) gets the method's `rest`, or what the user put there. Where
that projects, embedding and head are its matrices, and norms and biases get its own rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowmem.config.schema import OptimizerConfig, SumFormat, UpdateMode, settled
from lowmem.errors import ConfigError
from lowmem.kernels.grouped_weight import Weight
from lowmem.optim.method import ByRole, Method
from lowmem.optim.methods import METHODS, build_method, method_spec
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

PROJECTED_ROLES = ("attention", "mlp")
PROJECTING_REST = ("apollo", "apollo_mini")
"""Methods that scale a gradient from random lines of it: these suit embedding and head, too."""


@dataclass(frozen=True)
class Assignment:
    """The method of one parameter. weight_decay is 0 for norms and biases; place has no seed."""

    name: str
    role: str
    method: Method
    weight_decay: float
    place: Place


def takes_rank(method: str) -> bool:
    """Has this method a rank, that is, does it project?"""
    return "rank" in method_spec(method).arguments


def method_options(config: OptimizerConfig, role: str = "mlp") -> dict[str, Any]:
    """The keyword arguments of the main method for matrices of that role, e.g. "mlp.up".

    A fraction as rank stays a fraction here; `assign` multiplies it by the shorter side.
    """
    options: dict[str, Any] = dict(config.options)
    if config.states != "auto":
        options["states"] = config.states
    if config.rank != "auto":
        if not takes_rank(config.method):
            raise ConfigError(
                f"optimizer.rank = {config.rank} does not suit method {config.method!r}",
                "it has no rank; these have: " + ", ".join(filter(takes_rank, METHODS)),
                "leave out rank, or choose another method",
            )
        options["rank"] = _rank_of(config.rank, role)
    return options


def _rank_of(rank: Any, role: str) -> Any:
    """The entry of a table for one matrix, or for its kind."""
    if not isinstance(rank, dict):
        return rank
    kind = role.partition(".")[0]
    for key in (role, kind):
        if key in rank:
            return rank[key]
    missing = role if any(key.startswith(f"{kind}.") for key in rank) else kind
    raise ConfigError(
        f"optimizer.rank has no entry for {missing!r}",
        f"it has: {', '.join(rank)}",
        f'rank = {{attention = 128, mlp = 256}}, or one number for all; add "{missing}"',
    )


def assign(
    config: OptimizerConfig,
    weights: Mapping[str, Weight],
    roles: Mapping[str, str],
    head_dim: int,
) -> list[Assignment]:
    """One assignment per weight, in the order of `weights`. ConfigError for unsuitable options."""
    rest = _rest(config)
    decay = 0.0 if config.weight_decay == "auto" else settled(config.weight_decay)
    matrices = [name for name in weights if _is_matrix(roles[name])]
    indices = {name: index for index, name in enumerate(matrices)}
    return [
        Assignment(
            name,
            roles[name],
            _method_for(config, weight, roles[name], rest),
            0.0 if roles[name] in ("norm", "bias") else decay,
            Place(0, roles[name], indices.get(name, 0), max(1, len(matrices)), head_dim),
        )
        for name, weight in weights.items()
    ]


def _is_matrix(role: str) -> bool:
    return role.partition(".")[0] in PROJECTED_ROLES


def _method_for(config: OptimizerConfig, weight: Weight, role: str, rest: ByRole) -> Method:
    if not _is_matrix(role):
        return rest.of(role)
    options = method_options(config, role)
    if isinstance(options.get("rank"), float):
        options["rank"] = max(1, round(options["rank"] * min(weight.shape)))
    return build_method(config.method, options).matrix


def _rest(config: OptimizerConfig) -> ByRole:
    """What updates embedding, head, norms and biases."""
    rest, section = config.rest, "optimizer.rest"
    states: dict[str, Any] = {} if rest.states == "auto" else {"states": rest.states}
    if rest.method == "auto":
        if rest.options:
            raise ConfigError(
                f"{section} has options ({', '.join(rest.options)}) but no method",
                "without one the rest follows what the main method prescribes",
                'rest.method = "adamw"',
            )
        options = {k: v for k, v in method_options(config).items() if k != "rank"}
        if states and "rest_states" in method_spec(config.method).arguments:
            states = {"rest_states": rest.states}
        return build_method(config.method, options | states)
    projects = "rank" in method_spec(rest.method, section).arguments
    if projects and rest.method not in PROJECTING_REST:
        raise ConfigError(
            f"{section}.method = {rest.method!r} projects",
            "embedding, head and norms need a dense method, or one without a basis: "
            + ", ".join([*(m for m in METHODS if not takes_rank(m)), *PROJECTING_REST]),
            'rest.method = "adamw"',
        )
    built = build_method(rest.method, states | rest.options, section)
    return replace(built, embedding=built.matrix, head=built.matrix) if projects else built


def build_optimizer(
    config: OptimizerConfig,
    weights: Mapping[str, Weight],
    roles: Mapping[str, str],
    *,
    mode: UpdateMode,
    seed: int,
    head_dim: int,
    sums: SumFormat = "fp32",
) -> Optimizer:
    """The optimizer of a model, with all its state allocated where `config.place` says."""
    place = "device" if config.place == "auto" else config.place
    optimizer = Optimizer(mode, seed, place, sums=sums)
    for item in assign(config, weights, roles, head_dim):
        optimizer.add(item.name, weights[item.name], item.method, item.weight_decay, item.place)
    return optimizer


def learning_rate(config: OptimizerConfig, parameters: int) -> float:
    """The peak learning rate: what the user gave, or what the method's sheet says."""
    if config.lr != "auto":
        return settled(config.lr)
    return method_spec(config.method).learning_rate(parameters)


def weight_decay(config: OptimizerConfig, parameters: int) -> float:
    """The weight decay: what the user gave, or what the method's sheet says."""
    if config.weight_decay != "auto":
        return settled(config.weight_decay)
    return method_spec(config.method).weight_decay(parameters)
