"""Why a method was chosen or not: its own best plan beside the plan that was made.

    why(plan_with_that_method, plan)    Why("galore", "2.1 GiB too much in ...", Obstacle(...), ...)

Everything is read from the two plans and from the published evidence.
"""

from dataclasses import asdict, dataclass
from typing import Any

from lowmem.planner.plan import SCHEMA_VERSION, Plan
from lowmem.planner.quality import why_by_name_only
from lowmem.units import format_bytes

PERSISTENT = ("weights", "states", "projections", "staging", "workspace")
HELD = ("gradients",)


@dataclass(frozen=True)
class Obstacle:
    """What a plan fails on. bytes: that it takes, with all before it. short: beyond the usable."""

    what: str
    bytes: int
    short: int


@dataclass(frozen=True)
class Why:
    """The answer. reason: for people. obstacle: None where the method fits.

    plan: the best with that method. chosen: the one that is made without naming it.
    """

    method: str
    reason: str
    obstacle: Obstacle | None
    plan: Plan
    chosen: Plan

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "reason": self.reason,
            "obstacle": None if self.obstacle is None else asdict(self.obstacle),
            "plan": self.plan.to_json(),
            "chosen": self.chosen.to_json(),
        }


def why(plan: Plan, chosen: Plan, *, named: bool) -> Why:
    """The answer for the method of `plan`. named: the user asked for the method of `chosen`."""
    in_the_way = obstacle(plan)
    return Why(
        plan.choice.method, _reason(plan, chosen, in_the_way, named), in_the_way, plan, chosen
    )


def obstacle(plan: Plan) -> Obstacle | None:
    """The first of weights and states, held gradients and the worst moment that is too much."""
    memory, usable = plan.memory, plan.card.usable_bytes
    if plan.fits:
        return None
    persistent = sum(memory.parts.get(name, 0) for name in PERSISTENT)
    held = persistent + sum(memory.parts.get(name, 0) for name in HELD)
    if persistent > usable:
        return Obstacle("weights and states alone", persistent, persistent - usable)
    if held > usable:
        return Obstacle("weights, states and held gradients", held, held - usable)
    return Obstacle(
        f"the worst moment, {memory.instant}", memory.reserved, memory.reserved - usable
    )


def _reason(plan: Plan, chosen: Plan, in_the_way: Obstacle | None, named: bool) -> str:
    method, other = plan.choice.method, chosen.choice.method
    if in_the_way is not None:
        nearest = "nothing fits, and it comes nearest; " if method == other and not named else ""
        return f"{nearest}{in_the_way.what}: {format_bytes(in_the_way.short)} too much"
    if method == other:
        return "chosen: " + ("you named it" if named else "the best published quality that fits")
    if named:
        return f"it fits, but you named {other}"
    if told := why_by_name_only(method):
        return f"it fits, but is chosen by name only: {told}"
    mine, theirs = plan.quality, chosen.quality
    if mine is None or theirs is None or mine.rung == theirs.rung:
        return f"it fits, and is as good as {other} by what is published; {other} comes first"
    if mine.rung > theirs.rung:
        return (
            f"it fits, but {mine.nats - theirs.nats:.3f} nats behind {other} by what is published"
        )
    return f"it fits; {other} comes first in the planner's order all the same"
