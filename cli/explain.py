"""`lowmem plan --why METHOD` and `--compare CARD,CARD`: one plan beside another."""

from collections.abc import Sequence

from lowmem.cli.console import Console, rank_in_words
from lowmem.cli.settings import planned
from lowmem.config.schema import Config
from lowmem.errors import ConfigError, PlanError
from lowmem.planner.hardware import find_card
from lowmem.planner.plan import Plan
from lowmem.planner.why import HELD, PERSISTENT, Why
from lowmem.planner.why import why as why_of
from lowmem.units import format_bytes, format_count, format_span


def why(config: Config, method: str, console: Console, *, reuse: bool, as_json: bool) -> None:
    """What `method` needs on this card, what stands in its way, and what is taken instead."""
    chosen = planned(config, for_this_machine=False, reuse=reuse)
    plan = chosen
    if chosen.choice.method != method:
        asked = config.optimizer.model_copy(update={"method": method})
        with_it = config.model_copy(update={"optimizer": asked})
        plan = planned(with_it, for_this_machine=False, reuse=reuse)
    answer = why_of(plan, chosen, named=config.optimizer.method != "auto")
    if as_json:
        console.json(answer.to_json())
    else:
        _tell(answer, console)


def compare(config: Config, cards: str, console: Console, *, reuse: bool, as_json: bool) -> None:
    """A row for each card; PlanError (exit 3) after them when nothing fits any."""
    names = _cards(cards)
    plans = [
        planned(config.model_copy(update={"gpu": name}), for_this_machine=False, reuse=reuse)
        for name in names
    ]
    if as_json:
        console.json([plan.to_json() for plan in plans])
    else:
        console.table(
            _COMPARED, [_row(name, plan) for name, plan in zip(names, plans, strict=True)]
        )
        for name, plan in zip(names, plans, strict=True):
            for departure in plan.departures:
                console.result(f"{name}: {departure}")
        for line in _qualities(plans):
            console.result(line)
    if not any(plan.fits for plan in plans):
        nearest = min(plans, key=lambda plan: plan.memory.reserved - plan.card.usable_bytes)
        raise PlanError(
            f"nothing fits any of {', '.join(names)}",
            f"nearest is {nearest.card.name}: {nearest.choice.sentence()}",
            "\n".join(nearest.fix_lines) or "a smaller --model, or a larger card",
        )


def _cards(listed: str) -> list[str]:
    """The names in a list, each known. ConfigError: one of them is not, or is missing."""
    names = [name.strip() for name in listed.split(",")]
    if "" in names:
        raise ConfigError(
            f"--compare {listed!r} has an empty place",
            "it is a list of cards with commas between them",
            "--compare 12GB,16GB,24GB",
        )
    for name in names:
        find_card(name, "auto")
    return names


_COMPARED = [
    *("card", "fits", "method", ">rank", "states", "weights", "update", "recompute", ">micro"),
    *(">peak", ">used", ">tok/s", ">nats"),
]


def _row(name: str, plan: Plan) -> list[str]:
    choice = plan.choice
    return [
        name,
        "yes" if plan.fits else "no",
        choice.method,
        rank_in_words(choice.rank),
        choice.states,
        choice.weights,
        choice.update,
        choice.recompute,
        f"{choice.micro_batch}x{choice.accumulate}",
        format_bytes(plan.memory.reserved),
        f"{plan.memory.reserved / plan.card.usable_bytes:.0%}",
        format_count(plan.speed.tokens_per_second) if plan.speed else "?",
        f"{plan.quality.nats:+.3f}" if plan.quality else "?",
    ]


def _qualities(plans: Sequence[Plan]) -> list[str]:
    """Where penalties are from, each once."""
    told = [f"{p.choice.method}: {p.quality.sentence()}" for p in plans if p.quality is not None]
    return list(dict.fromkeys(told))


def _tell(answer: Why, console: Console) -> None:
    plan, chosen = answer.plan, answer.chosen
    console.result(f"{answer.method} on {plan.card.name}: {answer.reason}\n")
    shown = [plan] if plan is chosen else [chosen, plan]
    head = [f"{chosen.choice.method} (the plan)", *(each.choice.method for each in shown[1:])]
    facts = [_facts(each) for each in shown]
    rows = [[f"  {name}", *(fact[name] for fact in facts)] for name in facts[0]]
    console.table(["", *head], rows)
    for line in _qualities(shown):
        console.result(line)
    if not plan.fits:
        console.result("\nWhat would make it fit")
        for line in plan.fix_lines or ["a smaller --model, or a larger --gpu"]:
            console.result(f"  {line}")


def _facts(plan: Plan) -> dict[str, str]:
    """What is compared, in the order of the rows."""
    choice, memory = plan.choice, plan.memory
    persistent = sum(memory.parts.get(name, 0) for name in PERSISTENT)
    held = sum(memory.parts.get(name, 0) for name in HELD)
    seconds = plan.training_seconds
    return {
        "rank": rank_in_words(choice.rank),
        "states": choice.states,
        "weights": choice.weights,
        "update": choice.update,
        "recompute": choice.recompute,
        "micro-batch": f"{choice.micro_batch} x {choice.accumulate}",
        "sums": choice.sums if choice.accumulate > 1 else "none",
        "clip": "off" if choice.clip is None else f"{choice.clip:g}",
        "weights and states": format_bytes(persistent),
        "gradients held": format_bytes(held),
        "the rest at the peak": format_bytes(memory.tensors - persistent - held),
        "peak, reserved": format_bytes(memory.reserved),
        "usable": format_bytes(plan.card.usable_bytes),
        "quality": f"{plan.quality.nats:+.3f} nats" if plan.quality else "unknown",
        "tokens/s": format_count(plan.speed.tokens_per_second) if plan.speed else "unknown",
        "time": format_span(seconds) if seconds is not None else "unknown",
    }
