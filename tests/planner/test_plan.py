"""The published form of a plan: keys and meanings that scripts rely on."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.config.schema import Config
from lowmem.planner.plan import (
    Candidate,
    Card,
    Choice,
    Fix,
    Memory,
    PhasePeak,
    Plan,
    PublishedPlan,
    Rates,
    Speed,
    json_schema,
)
from lowmem.planner.quality import Penalty

RATES = Rates("rtx4090", 165.2, 1008, watts=450)
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
        "ends": "exact",
        "sums": "fp32",
        "boundaries": "keep",
        "place": "device",
        "blocks": "device",
        "compiled": False,
        "matmul": "exact",
    }
    assert record == {
        "schema_version": 3,
        "fits": True,
        "usable_bytes": 23_000,
        "peak_bytes": 10_000,
        "tensor_bytes": 9000,
        "allocated_bytes": 9500,
        "device_bytes": 10_000 + 500 + 300,
        "checkpoint_bytes": 0,
        "host_bytes": 0,
        "instant": "backward of block 2, loss",
        "parts": {"weights": 4000, "states": 5000},
        "phases": [],
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
        "training_kwh": 600 / 3600 * 0.45,
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
        "advice": [],
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
                "watts": 450,
            },
            "workspace": 2 * 32 * 2**20,
            "calibration": None,
            "warnings": [],
        },
        "notes": ["lr 0.01: arXiv:2403.03507"],
    }
    assert Config.model_validate(config) == PLAN.config


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


SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "plan.schema.json"
COUNTS = st.integers(0, 2**53)
FRACTIONS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(max_size=8)
PARTS = st.dictionaries(WORDS, COUNTS, max_size=3)
RANKS = st.one_of(st.none(), COUNTS, FRACTIONS, st.dictionaries(WORDS, COUNTS | FRACTIONS))
CHOICES = st.builds(
    Choice,
    WORDS,
    RANKS,
    WORDS,
    st.sampled_from(["fp32", "bf16"]),
    st.sampled_from(["unfused", "fused+subspace", "fused", "layer-major"]),
    st.sampled_from(["keep", "attn", "full"]),
    COUNTS,
    COUNTS,
    st.none() | FRACTIONS,
)
PENALTIES = st.builds(
    Penalty,
    FRACTIONS,
    WORDS,
    st.sampled_from(["published", "second-hand", "no evidence"]),
    st.lists(WORDS, max_size=2).map(tuple),
)
PHASES = st.builds(PhasePeak, WORDS, COUNTS, PARTS, WORDS)
CONFIGS: list[dict[str, Any]] = [
    {},
    {"optimizer": {"rank": {"mlp": 8, "attention": 0.25}, "betas": [0.9, 0.95], "side": "left"}},
    {"train": {"updates": 3, "clip": "off", "tokens": 1000} | {"updates": "auto"}},
    {
        "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "rope_scaling": {"type": "linear", "factor": 2.0}}
    },
]
PLANS = st.builds(
    Plan,
    st.sampled_from(CONFIGS).map(Config.model_validate),
    st.builds(
        Card, WORDS, COUNTS, COUNTS, COUNTS, COUNTS, WORDS, WORDS, st.none() | st.just(RATES)
    ),
    CHOICES,
    st.builds(Memory, COUNTS, COUNTS, COUNTS, PARTS, WORDS, st.lists(PHASES, max_size=2), COUNTS),
    st.lists(
        st.builds(
            Candidate, CHOICES, st.booleans(), COUNTS, st.booleans(), WORDS, st.none() | PENALTIES
        ),
        max_size=2,
    ),
    st.lists(st.builds(Fix, WORDS, COUNTS, st.booleans()), max_size=2),
    st.lists(WORDS, max_size=2),
    st.none(),
    st.none() | PENALTIES,
)


@given(PLANS)
def test_a_plan_is_read_back_as_it_was(plan: Plan) -> None:
    record = json.loads(json.dumps(plan.to_json()))
    again = Plan.from_json(record)
    assert again == plan
    assert again.to_json() == record


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": 4},
        {"fits": None},
        {"more": 1},
        {"parts": {"weights": "many"}},
        {"card": {"name": "x"}},
    ],
)
def test_what_is_no_plan_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Plan.from_json(PLAN.to_json() | change)


@pytest.mark.parametrize("name", [field.name for field in fields(PublishedPlan)])
def test_every_key_is_required(name: str) -> None:
    record = PLAN.to_json()
    del record[name]
    with pytest.raises(ValueError, match=name):
        Plan.from_json(record)


def test_the_committed_schema_is_current() -> None:
    command = "lowmem plan --schema > docs/plan.schema.json"
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema(), command


def test_the_published_form_follows_the_schema() -> None:
    schema = json_schema()
    assert disagreements(PLAN.to_json(), schema, schema) == []
    wrong = PLAN.to_json() | {"peak_bytes": "many", "more": 1}
    del wrong["fits"]
    assert disagreements(wrong, schema, schema) == [".fits", ".more", ".peak_bytes"]


def disagreements(
    value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = ""
) -> list[str]:
    """Places where a value does not follow a JSON schema: types, keys, words, references."""
    if "$ref" in schema:
        return disagreements(value, root["$defs"][schema["$ref"].split("/")[-1]], root, at)
    options = schema.get("anyOf", schema.get("oneOf"))
    if options is not None:
        return min((disagreements(value, each, root, at) for each in options), key=len)
    types: dict[str, Any] = {
        "integer": int,
        "number": (int, float),
        "string": str,
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    named = schema.get("type", list(types))
    wanted = [named] if isinstance(named, str) else named
    is_right = any(
        isinstance(value, types[name]) and (name == "boolean" or not isinstance(value, bool))
        for name in wanted
    )
    if not is_right or value not in schema.get("enum", [value]):
        return [at]
    if value != schema.get("const", value):
        return [at]
    found: list[str] = []
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        found += [f"{at}.{key}" for key in schema.get("required", ()) if key not in value]
        extra = schema.get("additionalProperties", True) is False
        found += [f"{at}.{key}" for key in value if key not in known and extra]
        for key in value.keys() & known.keys():
            found += disagreements(value[key], known[key], root, f"{at}.{key}")
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for key, item in value.items():
            found += disagreements(item, schema["additionalProperties"], root, f"{at}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += disagreements(item, schema["items"], root, f"{at}.{index}")
    return sorted(found)


@pytest.mark.parametrize(
    ("notes", "first"),
    [
        (["lr 0.01: arXiv:2403.03507"], []),
        (["batch 16 sequences instead of 512: larger ones do not fit", "clip 1"], [0]),
    ],
)
def test_what_became_other_than_expected_comes_first(notes: list[str], first: list[int]) -> None:
    assert replace(PLAN, notes=notes).departures == [notes[place] for place in first]
