"""A run notices when somebody takes more of the card than was planned."""

from collections.abc import Callable, Iterator

import pytest

from lowmem.config.schema import Config
from lowmem.planner.plan import Card, Choice, Memory, Plan
from lowmem.train.cap import Cap
from lowmem.train.events import Grown
from lowmem.train.watch import EVERY, DeviceReading, Watch

CARD = Card("imagined", 10_000, context=500, others=300, margin=700, source="measured")
CHOICE = Choice("galore", 4, "fp32", "fp32", "unfused", "keep", 8, 1, None)
PLAN = Plan(Config(), CARD, CHOICE, Memory(5000, 5000, 6000, {}, ""))
PLANNED = DeviceReading(total=10_000, free=10_000 - 500 - 300 - 6000, reserved=6000)


def reads(*readings: DeviceReading) -> Callable[[], DeviceReading]:
    left: Iterator[DeviceReading] = iter(readings)
    return lambda: next(left)


def with_others(more: int) -> DeviceReading:
    return DeviceReading(PLANNED.total, PLANNED.free - more, PLANNED.reserved)


def with_ours(more: int) -> DeviceReading:
    return DeviceReading(PLANNED.total, PLANNED.free - more, PLANNED.reserved + more)


def told(*readings: DeviceReading) -> list[Grown]:
    watch = Watch(PLAN, reads(*readings))
    last = EVERY * len(readings)
    return [grown for update in range(last) for grown in watch.after(update)]


def test_a_run_as_planned_says_nothing() -> None:
    assert told(PLANNED, PLANNED) == []


def test_others_may_take_the_margin_and_no_more() -> None:
    assert told(with_others(700)) == []
    assert told(with_others(701)) == [Grown(EVERY - 1, "others", 300, 1001)]


def test_what_we_reserve_may_be_one_percent_over() -> None:
    assert told(with_ours(60)) == []
    assert told(with_ours(61)) == [Grown(EVERY - 1, "ours", 6000, 6061)]


def test_each_is_told_once() -> None:
    grown = told(with_others(800), with_others(900), with_ours(500), with_ours(600))
    assert [(event.whose, event.update + 1) for event in grown] == [
        ("others", EVERY),
        ("ours", 3 * EVERY),
    ]


def test_the_device_is_asked_every_fifty_updates() -> None:
    assert EVERY == 50
    asked: list[int] = []

    def read() -> DeviceReading:
        asked.append(1)
        return PLANNED

    watch = Watch(PLAN, read)
    for update in range(120):
        list(watch.after(update))
    assert len(asked) == 2


def test_the_host_is_not_watched() -> None:
    def read() -> DeviceReading:
        raise AssertionError("asked")

    assert Watch.over(PLAN, "cpu", Cap()).plan is None
    assert list(Watch(None, read).after(EVERY - 1)) == []


@pytest.mark.parametrize("device", ["cuda"])
def test_a_run_on_a_card_is_watched(device: str) -> None:
    assert Watch.over(PLAN, device, Cap()).plan is PLAN
