"""The cap of a process on a card, without the card."""

from types import SimpleNamespace

import pytest
import torch

from lowmem.planner.hardware import find_card
from lowmem.planner.plan import Memory, Plan
from lowmem.train.cap import BALLAST, Cap, capped
from lowmem.units import GIB
from tests.train.test_watch import CHOICE, Config


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a process on a card of 139 GiB sets."""
    seen: list[float] = []
    properties = SimpleNamespace(total_memory=139 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", seen.append)
    return seen


def plan_for(card: str) -> Plan:
    return Plan(Config(), find_card(card, "cuda"), CHOICE, Memory(1, 1, 1, {}, ""))


def test_a_small_budget_holds_on_a_large_card(fractions: list[float]) -> None:
    plan = plan_for("12GB")
    with capped(plan, "cuda", BALLAST) as cap:
        assert cap.bytes == plan.card.usable_bytes + BALLAST
        assert cap.bytes < 12 * GIB
    assert fractions == [cap.bytes / (139 * GIB), 1.0]


def test_the_ballast_is_of_the_margin_of_every_card(fractions: list[float]) -> None:
    for card in ("8GB", "12GB", "24GB", "80GB"):
        assert plan_for(card).card.margin > BALLAST


def test_a_larger_budget_than_the_card_is_the_whole_card(
    fractions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: small)
    with capped(plan_for("24GB"), "cuda"):
        pass
    assert fractions == [1.0, 1.0]


def test_without_a_card_or_a_plan_there_is_no_cap(fractions: list[float]) -> None:
    with capped(plan_for("12GB"), "cpu") as cap, capped(None, "cuda") as other:
        assert cap == other == Cap()
        cap.take_ballast()
        assert cap.held_back == 0
    assert fractions == []
