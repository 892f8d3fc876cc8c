"""What stands in a method's way, read from plans made up by hand."""

from dataclasses import replace

import pytest

from lowmem.planner.plan import Memory, Plan
from lowmem.planner.quality import Penalty
from lowmem.planner.why import Obstacle, obstacle, why
from tests.planner.test_plan import CARD, CHOICE, MEMORY, PLAN

USABLE = CARD.usable_bytes  # 23,000


def taking(parts: dict[str, int], reserved: int) -> Plan:
    memory = Memory(sum(parts.values()), reserved, reserved, parts, "loss")
    return replace(PLAN, memory=memory)


@pytest.mark.parametrize(
    ("parts", "reserved", "expected"),
    [
        ({"weights": 20_000}, USABLE, None),
        (
            {"weights": 20_000, "states": 3000, "projections": 500, "loss": 100},
            24_000,
            Obstacle("weights and states alone", 23_500, 500),
        ),
        (
            {"weights": 20_000, "workspace": 3000, "gradients": 250, "loss": 900},
            25_000,
            Obstacle("weights, states and held gradients", 23_250, 250),
        ),
        (
            {"weights": 20_000, "gradients": 3000, "loss": 50},
            23_070,
            Obstacle("the worst moment, loss", 23_070, 70),
        ),
    ],
)
def test_the_first_thing_that_is_too_much(
    parts: dict[str, int], reserved: int, expected: Obstacle | None
) -> None:
    assert obstacle(taking(parts, reserved)) == expected


def of(method: str, nats: float, *, reserved: int = 10_000) -> Plan:
    return replace(
        PLAN,
        choice=replace(CHOICE, method=method),
        quality=Penalty(nats, "a table", "published"),
        memory=replace(MEMORY, reserved=reserved, parts={"weights": reserved}),
    )


@pytest.mark.parametrize(
    ("plan", "chosen", "named", "reason"),
    [
        (of("galore", 0.0), of("galore", 0.0), False, "chosen: the best published quality"),
        (of("galore", 0.0), of("galore", 0.0), True, "chosen: you named it"),
        (
            of("galore", 0.0, reserved=24_000),
            of("galore", 0.0, reserved=24_000),
            False,
            "nothing fits, and it comes nearest; weights and states alone: 1000 B too much",
        ),
        (
            of("adamw", 0.0, reserved=30_000),
            of("galore", 0.1),
            False,
            "weights and states alone: 6.84 KiB too much",
        ),
        (of("adamw", 0.1), of("galore", 0.0), True, "it fits, but you named galore"),
        (of("adamw", 0.1), of("galore", 0.02), False, "0.080 nats behind galore"),
        (of("adamw", 0.0), of("galore", 0.001), False, "as good as galore"),
        (of("adamw", -0.1), of("galore", 0.0), False, "galore comes first in the planner"),
        (of("q_apollo", -0.1), of("galore", 0.0), False, "by name only: its memory lies in 8-bit"),
        (of("lion", 0.0), of("galore", 0.1), False, "chosen by name only: nobody has published"),
    ],
)
def test_the_reason_follows_from_the_two_plans(
    plan: Plan, chosen: Plan, named: bool, reason: str
) -> None:
    answer = why(plan, chosen, named=named)
    assert reason in answer.reason
    assert answer.method == plan.choice.method
    assert Plan.from_json(answer.to_json()["chosen"]) == chosen
    assert (answer.to_json()["obstacle"] is None) == plan.fits
