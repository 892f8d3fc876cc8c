"""Follow `frugal__*`; subspaces that were drawn at random are loaded as recorded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lowmem.optim.blocks import Blocks
from lowmem.optim.formats import State, number, tensor
from lowmem.optim.method import Method, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from tests.optim.followers.oracle import (
    Oracle,
    Outcome,
    Settle,
    Steered,
    judge,
    run,
    take_recorded,
)


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    method = build_method("frugal", options_of(about))
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.other)
    if about["projection"] == "block":
        return _follow_blocks(oracle, methods, method.matrix)
    for name in about["projected"]:
        projects = isinstance(method.matrix, Projected)  # at density 0 there is nothing to choose
        methods[name] = Steered(method.matrix, _settle(oracle, name)) if projects else method.matrix
    _, error = run(oracle, methods)
    return judge(oracle, error)


def options_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The options of frugal that the metadata names."""
    projection = {
        "block": lambda: "blocks",
        "coord": lambda: about["coord_choice"],
        "svd": lambda: about["proj_type"],
    }[about["projection"]]()
    base = {"adamw": "adam"}.get(about["base"], about["base"])
    options = {
        "density": float(about["density"]),
        "gap": about["gap"],
        "projection": projection,
        "order": about.get("block_order") or "descending",
        "side": about.get("proj_side") or "std",
        "solver": "eigh",
        "scale": about["proj_params_lr_scale"],
        "state_free": about["inactive_update_rule"],
        "state_free_scale": about["inactive_lr_scale"],
        "base": base,
        "bias": "inside" if about.get("correct_bias", True) else "off",
        "on_refresh": "reset" if about["reset_statistics"] or projection == "blocks" else "keep",
        "staggered": False,
    }
    given = {"betas": tuple(about["betas"])} if about.get("betas") and base != "sgd" else {}
    for key in ("eps", "momentum", "dampening", "nesterov", "sign"):
        if about.get(key) is not None:
            given[key] = about[key]
    if "sign_update" in about:
        given["sign"] = about["sign_update"]
    return options | given


def _settle(oracle: Oracle, name: str) -> Settle:
    """Put the recorded projection of one matrix in place of ours; ValueError if ours is wrong."""
    about = oracle.about
    chosen = about["proj_type"] if about["projection"] == "svd" else about["coord_choice"]
    load = _LOADERS[chosen]

    def settle(update: int, state: State) -> None:
        if update in about["refresh_steps"]:
            prefix = f"proj.{update}.{name}"
            found = {
                key.removeprefix(prefix).removeprefix("."): value
                for key, value in oracle.tensors.items()
                if key == prefix or key.startswith(f"{prefix}.")
            }
            load(state, found, tuple(about["shapes"][name]))

    return settle


Load = Callable[[State, Mapping[str, Tensor], tuple[int, ...]], None]
"""load(state, recorded: key after the name -> tensor, shape of the matrix)"""


def _bases(
    state: State, recorded: Mapping[str, Tensor], shape: tuple[int, ...]
) -> list[tuple[Tensor, Tensor]]:
    """(ours, recorded), both (s, r) with the vectors as columns."""
    if "basis" in state:
        basis = tensor(state, "basis")
        (only,) = recorded.values()
        return [(basis, only.T if state["right"] else only)]
    left, right = tensor(state, "left.basis"), tensor(state, "right.basis")
    other = recorded["right"]
    return [(left, recorded["left"]), (right, other if other.shape == right.shape else other.T)]


def _load_svd(state: State, recorded: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    for ours, theirs in _bases(state, recorded, shape):
        take_recorded(ours, theirs, "the basis")


def _load_random(state: State, recorded: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    for ours, theirs in _bases(state, recorded, shape):
        _put(ours, theirs)


def _load_randperm(state: State, recorded: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """0/1 matrices: where the ones are."""
    if "rows" in state and "columns" in state:
        columns = tensor(state, "columns")
        along = 0 if recorded["right"].shape == (shape[1], columns.numel()) else 1
        _put(tensor(state, "rows"), recorded["left"].argmax(dim=0))
        _put(columns, recorded["right"].argmax(dim=along))
        return
    (only,) = recorded.values()
    if "columns" in state:
        _put(tensor(state, "columns"), only.argmax(dim=1))
    else:
        _put(tensor(state, "rows"), only.argmax(dim=0))


def _load_lines(state: State, recorded: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    (only,) = recorded.values()
    _put(tensor(state, "columns" if "columns" in state else "rows"), only)


def _load_entries(state: State, recorded: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """In their order, which needs no more than 65536 entries in all."""
    _put(tensor(state, "positions"), recorded["rows"] * shape[1] + recorded["cols"])


def _put(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(f"a choice of shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}")
    ours.copy_(theirs)


_LOADERS: dict[str, Load] = {
    "svd": _load_svd,
    "random": _load_random,
    "randperm": _load_randperm,
    "columns": _load_lines,
    "rows": _load_lines,
    "randk": _load_entries,
}


@dataclass(frozen=True)
class RecordedBlocks(Blocks):
    """Turns as recorded: turn -> positions of the active matrices."""

    turns: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def has_turn(self, state: State, turn: int) -> bool:
        return number(state, "index") in self.turns.get(turn, frozenset())


def _follow_blocks(oracle: Oracle, methods: dict[str, Method], matrix: Method) -> Outcome:
    """Our own turns, compared with the recorded ones; random ones as recorded."""
    about = oracle.about
    assert isinstance(matrix, Blocks)
    names = about["block_names_in_order"]
    turns = {
        update // about["gap"]: frozenset(oracle.tensors[f"proj.{update}.active"].tolist())
        for update in about["refresh_steps"]
    }
    if about["block_order"] == "random":
        parts = {key: getattr(matrix, key) for key in ("density", "order", "gap", "active")}
        matrix = RecordedBlocks(**parts, inactive=matrix.inactive, turns=turns)
    places = {name: replace(Place(), index=i, count=len(names)) for i, name in enumerate(names)}
    wrong: list[str] = []

    def after(done: int, optimizer: Optimizer) -> None:
        active = {i for i, name in enumerate(names) if optimizer.slots[name].state["active"]}
        if active != turns[(done - 1) // about["gap"]]:
            wrong.append(f"active.{done - 1}")

    _, error = run(oracle, methods | dict.fromkeys(names, matrix), places, after)
    return judge(oracle, error, wrong)
