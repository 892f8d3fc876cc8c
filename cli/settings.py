"""From what was typed to a checked configuration, its plan, and the command that says it all."""

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.defaults import settle
from lowmem.config.flags import FLAGS
from lowmem.config.load import Loaded, flatten, load
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, settled
from lowmem.config.toml import toml_value
from lowmem.data.cache import cache_home
from lowmem.errors import HardwareError, PlanError
from lowmem.planner.cache import keep_plan, kept_plan, plan_key
from lowmem.planner.hardware import find_card
from lowmem.planner.plan import Plan
from lowmem.units import format_bytes


def loaded(given: Given, console: Console) -> Loaded:
    """The configuration of flags, variables and files; warnings are said."""
    result = load(given.flags, given.files, os.environ, given.assignments)
    for warning in result.warnings:
        console.say(f"warning: {warning}")
    return result


def planned(config: Config, *, for_this_machine: bool, reuse: bool = False) -> Plan:
    """The plan for `config`. Without for_this_machine the card need not be here.

    reuse: take it from the cache where it was made before; then torch is not imported.
    """
    if config.model != "auto":
        resolve_model(config.model, Path.cwd())  # a slip is told before a device is asked for
    named_card = config.gpu.strip().lower() != "auto"
    cuda = _plans_for_cuda(config.train.device, named_card, for_this_machine)
    given = config
    config, notes = settle(given, cuda=cuda)
    if named_card and given.train.device == "auto" and not cuda:
        notes.append(f"device cpu instead of cuda: none is here; {config.gpu} bound the memory")
    card = find_card(config.gpu, "cuda" if cuda else "cpu")
    if config.others != "auto":
        card = replace(card, others=settled(config.others))
    folder, key = cache_home() / "plans", plan_key(config, card, notes)
    kept = kept_plan(folder, key) if reuse else None
    if kept is not None:
        return kept
    from lowmem.planner.search import make_plan  # imports torch

    smaller = partial(_with_batch, given, cuda) if given.train.batch == "auto" else None
    plan = make_plan(config, card, notes, smaller)
    if named_card:  # what is free on this machine is never the same again
        with suppress(OSError):  # the plan is there; `lowmem doctor` tells of the cache
            keep_plan(folder, key, plan)
    return plan


def _with_batch(config: Config, cuda: bool, rows: int) -> tuple[Config, list[str]]:
    """`config`, which has no batch, settled for one of so many sequences."""
    train = config.train.model_copy(update={"batch": f"{rows}seq"})
    return settle(config.model_copy(update={"train": train}), cuda=cuda)


def _plans_for_cuda(device: str, named_card: bool, for_this_machine: bool) -> bool:
    """HardwareError: a run on CUDA is asked for where there is none."""
    if device == "cpu":
        return False
    if named_card and not for_this_machine:
        return True
    import torch  # here, because `lowmem plan --gpu 24GB` needs none

    here = torch.cuda.is_available()
    if for_this_machine and device == "cuda" and not here:
        raise no_cuda()
    return device == "cuda" or here


def no_cuda() -> HardwareError:
    return HardwareError(
        "--device cuda: PyTorch sees no CUDA device",
        "no driver, a CPU build of PyTorch, or CUDA_VISIBLE_DEVICES hides the card",
        "--device cpu, or see `lowmem doctor`",
    )


def require_fit(plan: Plan) -> None:
    """PlanError with the largest parts and the changes that help, unless the plan fits."""
    if plan.fits:
        return
    need = format_bytes(plan.memory.reserved)
    usable = format_bytes(plan.card.usable_bytes)
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])[:4]
    largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
    raise PlanError(
        f"the plan does not fit: {need} needed, {usable} usable on {plan.card.name}",
        f"{plan.choice.sentence()}\nlargest parts: {largest}",
        "\n".join(plan.fix_lines) or "a smaller --model, or a larger --gpu",
    )


def explicit_command(plan: Plan, given: Given, model: str | None) -> str:
    """The command line that gives plan.config without any default or environment.

    model: as the user named it, None for an inline table (which then comes from --config).
    """
    words = ["lowmem", "train"]
    for path in given.files if model is None else []:
        words += ["--config", str(path)]
    for flag, value in _flags(plan.config, model):
        words += [flag, value] if value else [flag]
    return shlex.join(words)


def _flags(config: Config, model: str | None) -> Iterator[tuple[str, str]]:
    """(flag, value) for every value with a flag; --set for others that differ from the default."""
    flag_of = {key: flag for flag, key in FLAGS.items()}
    defaults = dict(flatten(Config().model_dump()))
    if model is not None:
        yield "--model", model
    for key, value in flatten(config.model_dump(exclude={"model", "recipe"})):
        if value in (None, {}, "auto"):
            continue
        if isinstance(value, bool) and key in flag_of:
            if value:
                yield flag_of[key], ""
        elif key in flag_of:
            yield flag_of[key], value if isinstance(value, str) else toml_value(value)
        elif key not in defaults or value != defaults[key]:
            yield "--set", f"{key}={toml_value(value)}"
