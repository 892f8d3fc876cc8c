"""The published form of a plan: keys and meanings that scripts rely on."""

import json
from dataclasses import replace

import pytest

from lowmem.config.schema import Config
from lowmem.planner.plan import (
    Candidate,
    Card,
    Choice,
    Fix,
    Memory,
    Plan,
    Rates,
    Speed,
    recorded_plan,
)
from lowmem.planner.quality import Penalty

RATES = Rates("rtx4090", 165.2, 1008)
CARD = Card(
    "rtx4090", total=24_000, context=500, others=300, margin=200, source="preset", rates=RATES
)
CHOICE = Choice("galore", {"mlp": 8, "attention": 4}, "8bit", "bf16", "unfused", "attn", 4, 3, 1.0)
MEMORY = Memory(9000, 9500, 10_000, {"weights": 4000, "states": 5000}, "backward of block 2, loss")
SPEED = Speed(1000.0, 20.0, {"products": 15.0, "optimizer": 5.0}, 0.25)
PLAN = Plan(
    Config.model_validate({"train": {"updates": 30}}),
    CARD,
    CHOICE,
    MEMORY,
    [Candidate(replace(CHOICE, method="adamw", rank=None), False, 30_000, True, "7 B too much")],
    [Fix("--recompute full", 1000, True)],
    ["lr 0.01: arXiv:2403.03507"],
    SPEED,
    Penalty(0.04, "arXiv:2403.03507, Table 2", "no evidence", ("this size",)),
)


def test_the_card_leaves_what_nothing_else_takes() -> None:
    assert CARD.usable_bytes == 24_000 - 500 - 300 - 200


@pytest.mark.parametrize(("reserved", "fits"), [(22_999, True), (23_000, True), (23_001, False)])
def test_a_plan_fits_up_to_the_last_byte(reserved: int, fits: bool) -> None:
    plan = replace(PLAN, memory=replace(MEMORY, reserved=reserved))
    assert plan.fits == fits == plan.to_json()["fits"]


def test_the_published_form_has_these_keys_and_no_others() -> None:
    record = json.loads(json.dumps(PLAN.to_json()))
    config = record.pop("config")
    choice = {
        "method": "galore",
        "rank": {"mlp": 8, "attention": 4},
        "states": "8bit",
        "weights": "bf16",
        "update": "unfused",
        "recompute": "attn",
        "micro_batch": 4,
        "accumulate": 3,
        "clip": 1.0,
        "logits": "recompute",
    }
    assert record == {
        "schema_version": 1,
        "fits": True,
        "usable_bytes": 23_000,
        "peak_bytes": 10_000,
        "tensor_bytes": 9000,
        "allocated_bytes": 9500,
        "device_bytes": 10_000 + 500 + 300,
        "instant": "backward of block 2, loss",
        "parts": {"weights": 4000, "states": 5000},
        "choice": choice,
        "quality": {
            "nats": 0.04,
            "source": "arXiv:2403.03507, Table 2",
            "mark": "no evidence",
            "doubts": ["this size"],
        },
        "speed": {
            "tokens_per_second": 1000.0,
            "seconds_per_update": 20.0,
            "parts": {"products": 15.0, "optimizer": 5.0},
            "error": 0.25,
        },
        "training_seconds": 600.0,
        "candidates": [
            {
                "choice": choice | {"method": "adamw", "rank": None},
                "fits": False,
                "peak_bytes": 30_000,
                "bound": True,
                "reason": "7 B too much",
                "quality": None,
            }
        ],
        "fixes": [{"flags": "--recompute full", "saves": 1000, "fits": True}],
        "card": {
            "name": "rtx4090",
            "total": 24_000,
            "context": 500,
            "others": 300,
            "margin": 200,
            "source": "preset",
            "kind": "cuda",
            "rates": {
                "card": "rtx4090",
                "tflops": 165.2,
                "bandwidth": 1008,
                "measured": False,
            },
            "workspace": 2 * 32 * 2**20,
            "calibration": None,
            "warnings": [],
        },
        "notes": ["lr 0.01: arXiv:2403.03507"],
    }
    assert Config.model_validate(config) == PLAN.config


def test_a_recorded_plan_is_the_plan_without_its_alternatives() -> None:
    record = json.loads(json.dumps(PLAN.to_json()))
    read = recorded_plan(record, PLAN.config)
    assert (read.choice, read.memory) == (PLAN.choice, PLAN.memory)
    assert replace(read.card, warnings=()) == PLAN.card
    assert (read.fits, read.device_bytes) == (PLAN.fits, PLAN.device_bytes)
    del record["card"]["context"]
    with pytest.raises(TypeError):
        recorded_plan(record, PLAN.config)


def test_a_plan_tells_presets_from_measurements() -> None:
    assert PLAN.card.presets == ["context", "others", "margin", "workspace"]
    measured = replace(PLAN.card, source="measured", calibration="cards/a.json")
    assert measured.presets == ["margin"]
    assert replace(measured, kind="cpu").presets == ["margin"]


@pytest.mark.parametrize(
    ("choice", "said", "unsaid"),
    [
        (CHOICE, ["galore rank {'mlp': 8, 'attention': 4}", "8bit states", "bf16 weights"], []),
        (CHOICE, ["unfused", "recompute attn", "micro-batch 4 x 3"], []),
        (replace(CHOICE, method="adamw", rank=None), ["adamw, 8bit states"], ["rank"]),
        (replace(CHOICE, rank=0.25), ["galore rank 0.25,"], []),
    ],
)
def test_a_choice_in_a_sentence(choice: Choice, said: list[str], unsaid: list[str]) -> None:
    sentence = choice.sentence()
    assert all(words in sentence for words in said)
    assert not any(words in sentence for words in unsaid)
