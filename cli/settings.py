"""From what was typed to a checked configuration, its plan, and the command that says it all."""

import os
import shlex
from collections.abc import Iterator

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.flags import FLAGS
from lowmem.config.load import Loaded, flatten, load
from lowmem.config.schema import Config
from lowmem.config.toml import toml_value
from lowmem.errors import HardwareError, PlanError
from lowmem.planner.plan import Plan
from lowmem.units import format_bytes


def loaded(given: Given, console: Console) -> Loaded:
    """The configuration of flags, variables and files; warnings are said."""
    result = load(given.flags, given.files, os.environ, given.assignments)
    for warning in result.warnings:
        console.say(f"warning: {warning}")
    return result


def planned(config: Config, *, for_this_machine: bool) -> Plan:
    """The plan for `config`. Without for_this_machine the card need not be here."""
    import torch

    from lowmem.config.defaults import settle
    from lowmem.planner.hardware import find_card
    from lowmem.planner.search import make_plan

    here = torch.cuda.is_available()
    wanted, named_card = config.train.device, config.gpu != "auto"
    if for_this_machine and wanted == "cuda" and not here:
        raise no_cuda()
    elsewhere = named_card and not for_this_machine
    cuda = wanted == "cuda" or (wanted == "auto" and (here or elsewhere))
    config, notes = settle(config, cuda=cuda)
    return make_plan(config, find_card(config.gpu, "cuda" if cuda else "cpu"), notes)


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
    width = max((len(fix.flags) for fix in plan.fixes), default=0)
    fixes = [
        f"{fix.flags:{width}}  -{format_bytes(fix.saves)}{', fits' if fix.fits else ''}"
        for fix in plan.fixes
    ]
    raise PlanError(
        f"the plan does not fit: {need} needed, {usable} usable on {plan.card.name}",
        f"{plan.choice.sentence()}\nlargest parts: {largest}",
        "\n".join(fixes) or "a smaller --model, or a larger --gpu",
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
    for key, value in flatten(config.model_dump(exclude={"model"})):
        if value in (None, {}, "auto"):
            continue
        if isinstance(value, bool) and key in flag_of:
            if value:
                yield flag_of[key], ""
        elif key in flag_of:
            yield flag_of[key], value if isinstance(value, str) else toml_value(value)
        elif key not in defaults or value != defaults[key]:
            yield "--set", f"{key}={toml_value(value)}"
