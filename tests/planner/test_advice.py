"""When the optimizer is not what takes the memory, a plan says what is."""

from dataclasses import replace
from typing import Any

import pytest

from lowmem.config.schema import Config
from lowmem.planner.hardware import find_card
from lowmem.planner.plan import Memory, Plan
from lowmem.planner.search import make_plan
from tests.planner.test_plan import CARD, CHOICE, PLAN

LARGE = {"weights": 13_000, "states": 2000, "activations": 5000}
SMALL = {"weights": 1000, "states": 500, "activations": 6000, "loss": 2500}
STATELESS = {"weights": 13_000, "states": 100, "activations": 5000, "loss": 3000}
USABLE = CARD.usable_bytes


def plan(parts: dict[str, int], reserved: int = 10_000, **choice: Any) -> Plan:
    memory = Memory(sum(parts.values()), reserved, reserved, parts, "loss")
    return replace(PLAN, memory=memory, choice=replace(CHOICE, **choice))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (plan(SMALL), "of the peak activations 60%, loss 25%, states and projections 5%: "),
        (plan(SMALL), "another method saves 500 B at most, a smaller --micro-batch has 8.30 KiB"),
        (plan(SMALL, update="fused"), "a smaller --batch has"),
        (plan(SMALL, micro_batch=1, recompute="attn"), "--recompute full has"),
        (plan(SMALL, micro_batch=1, recompute="full"), "a shorter --seq-len has"),
        (plan(SMALL, rank=None), None),  # nobody tries to save states, and it fits
        (plan(SMALL, USABLE, rank=None), "another method saves 500 B at most"),
        (plan(STATELESS, USABLE + 1, rank=None), "another method saves 100 B at most"),
        (plan(STATELESS, USABLE // 2, rank=None), None),
        (plan(LARGE), None),  # the weights take most: a low rank is right
        (plan(LARGE | {"states": 4000}, USABLE), None),  # another method would help
        (plan({"weights": 100, "states": 400, "activations": 700, "gradients": 2000}), None),
    ],
)
def test_advice_is_given_where_it_is_true(made: Plan, said: str | None) -> None:
    assert len(made.advice) == (said is not None)
    assert said is None or said in made.advice[0]


def test_galore_at_60m_is_told_what_takes_the_memory() -> None:
    config = Config.model_validate(
        {
            "model": "llama-60m",
            "optimizer": {"method": "galore", "rank": 128, "states": "8bit"},
            "data": {"seq_len": 256},
            "train": {"updates": 5, "batch": "32seq", "device": "cuda", "weights": "bf16"}
            | {"micro_batch": 32, "update": "unfused", "recompute": "keep"},
        }
    )
    made = make_plan(config, find_card("24GB", "cuda"), [])
    parts, whole = made.memory.parts, made.memory.tensors
    assert (parts["activations"] + parts["loss"]) / whole > 0.6
    (sentence,) = made.advice
    assert f"activations {parts['activations'] / whole:.0%}" in sentence
    assert "a smaller --micro-batch" in sentence
