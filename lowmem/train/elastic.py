"""Other settings for a run that goes on: what was asked, and the way down to a smaller card.

first_that_fits(config, {"gpu"}, plan_of)    # unchanged -> 8-bit states -> ranks -> int8
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, OptimizerConfig
from lowmem.errors import CheckpointError, ConfigError, command_line
from lowmem.optim.assign import learning_rate, takes_rank
from lowmem.optim.convert import convert
from lowmem.optim.methods import method_spec
from lowmem.planner.plan import Plan
from lowmem.train.build import declared
from lowmem.train.checkpoint import read_state
from lowmem.train.convert import written_optimizer

LEAST_RANK = 4
SAME_EVERYWHERE = ("betas", "gap")  # options that mean the same to every method that has them
OF_THE_ORDER = ("recompute", "boundaries", "blocks")  # what suits an update mode; changes no bit


def changed(config: Config, asked: Config, given: Set[str]) -> Config:
    """`asked`, the configuration of a run with the `given` keys, made whole.

    Another method keeps schedule and learning rate, and of its options those that mean the same.
    Another update mode has what blocks keep, and where, planned anew. ConfigError: the method was
    tuned for another learning rate, and none is given.
    """
    if asked.train.update != config.train.update:
        asked = _reordered(asked, given)
    old, new = config.optimizer, asked.optimizer
    if "optimizer.method" not in given or old.method == new.method:
        return asked
    spec = method_spec(new.method)
    if "optimizer.lr" not in given:
        _require_same_rate(config, new)
    known = {key: value for key, value in old.options.items() if key in spec.arguments}
    keeps_rank = "optimizer.rank" in given or takes_rank(new.method)
    keeps_states = "optimizer.states" in given or new.states in spec.states
    optimizer = new.model_copy(
        update={
            "rank": new.rank if keeps_rank else "auto",
            "states": new.states if keeps_states else "auto",
            "options": {key: known[key] for key in SAME_EVERYWHERE if key in known},
        }
    )
    return asked.model_copy(update={"optimizer": optimizer})


def _reordered(asked: Config, given: Set[str]) -> Config:
    free = {key: "auto" for key in OF_THE_ORDER if f"train.{key}" not in given}
    asked = _with(asked, "train", free)
    if asked.train.update in ("fused", "fused+subspace") and "optimizer.place" not in given:
        asked = _with(asked, "optimizer", {"place": "auto"})  # they need states in backward
    return asked


def _require_same_rate(config: Config, new: OptimizerConfig) -> None:
    parameters = resolve_model(config.model, Path.cwd()).parameters
    rates = [
        learning_rate(OptimizerConfig(method=method), parameters)
        for method in (config.optimizer.method, new.method)
    ]
    if rates[0] != rates[1]:
        raise ConfigError(
            f"optimizer.method = {new.method!r} needs another optimizer.lr than {new.lr}",
            f"the sheet of {config.optimizer.method} says {rates[0]:g}, that of {new.method} "
            f"{rates[1]:g}",
            f"--lr {rates[1]:g}, or --lr {new.lr} to keep it",
        )


@dataclass(frozen=True)
class Way:
    """A way that was tried. said: what it changes."""

    said: str
    choice: str
    fits: bool

    def sentence(self) -> str:
        return f"{self.said} ({self.choice})"


def first_that_fits(
    config: Config, given: Set[str], plan_of: Callable[[Config], Plan]
) -> tuple[Plan, list[Way]]:
    """(the plan of the first way down that fits, or of the last; every way that was tried).

    Settings that were given stay. Each way contains those before it.
    """
    ways = []
    for said, candidate in ways_down(config, given):
        plan = plan_of(candidate)
        ways.append(Way(said, plan.choice.sentence(), plan.fits))
        if plan.fits:
            break
    return plan, ways


def ways_down(config: Config, given: Set[str]) -> Iterator[tuple[str, Config]]:
    """(what changes, configuration), from exact to least exact."""
    yield "the run's settings", config
    free = {
        key: "auto"
        for key in ("micro_batch", "recompute", "logits", "boundaries")
        if f"train.{key}" not in given
    }
    config = _with(config, "train", free)
    yield "another micro-batch and recomputation", config
    if "train.sums" not in given:
        config = _with(config, "train", {"sums": "auto"})
        yield "sums of gradients in another format", config
    method, states = config.optimizer.method, config.optimizer.states
    if (
        "optimizer.states" not in given
        and states != "8bit"
        and "8bit" in method_spec(method).states
    ):
        config = _with(config, "optimizer", {"states": "8bit"})
        yield "8-bit states", config
    while takes_rank(method) and "optimizer.rank" not in given:
        smaller = halved(config.optimizer.rank)
        if smaller is None:
            break
        config = _with(config, "optimizer", {"rank": smaller})
        yield f"rank {smaller}", config
    if "train.weights" not in given and config.train.weights != "int8":
        config = _with(config, "train", {"weights": "int8"})
        yield "int8 weights", config


def halved(rank: Any) -> Any:
    """Half of a rank or of every rank of a table; None where that would be too little."""
    if isinstance(rank, dict):
        parts = {key: halved(value) for key, value in rank.items()}
        return None if None in parts.values() else parts
    if isinstance(rank, int):
        return rank // 2 if rank // 2 >= LEAST_RANK else None
    return rank / 2 if isinstance(rank, float) and rank / 2 >= 1 / 64 else None


def require_convertible(folder: Path, config: Config) -> None:
    """CheckpointError unless a run of these settings can take over a checkpoint.

    Only shapes are looked at: nothing is allocated, nothing changes.
    """
    state = read_state(folder)
    if "settings" not in state:
        raise CheckpointError(
            f"{folder} does not say what settings it was written with",
            f"lowmem {state.get('lowmem')} wrote it before there was a conversion",
            f"{command_line('resume', folder.parent.parent)},"
            " and again with other settings after a save",
        )
    model, optimizer = declared(config, "meta")
    written = written_optimizer(folder, state["settings"], model, optimizer)
    convert(optimizer, written, written.state_tensors(), state["numbers"], 0)


def _with(config: Config, section: str, values: dict[str, Any]) -> Config:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})
