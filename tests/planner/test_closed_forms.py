"""The planner against formulas written slowly (closed_forms.py)."""

from typing import Any

import pytest

from lowmem.planner.plan import Choice
from tests.planner.closed_forms import Case, peak, persistent
from tests.planner.planned import model_named, planned

BATCHES = {
    "60m": (8, 256, 128),
    "130m": (8, 256, 192),
    "1b": (2, 1024, 512),
    "7b": (1, 2048, 1024),
    "13b": (1, 2048, 1280),
    "llama3-8b": (1, 4096, 1024),
}
"""Sequences, their length, and a rank."""

TOLERANCE = 0.002
"""Of the peak. Left out are 0-dim tensors, absolute maxima of 8-bit blocks and the like: the worst
of all cases below is off by 0.04 %."""

CASES: dict[str, dict[str, Any]] = {
    "adamw keep": {"method": "adamw", "moments": "fp32", "level": "keep"},
    "adamw attn": {"method": "adamw", "moments": "fp32", "level": "attn"},
    "adamw full": {"method": "adamw", "moments": "fp32", "level": "full"},
    "adamw 8bit": {"method": "adamw", "moments": "8bit"},
    "adamw 8bit int8": {"method": "adamw", "moments": "8bit", "weights": "int8"},
    "galore": {"method": "galore", "moments": "8bit"},
    "galore svd": {"method": "galore", "moments": "8bit", "svd": True},
    "fira": {"method": "fira", "moments": "bf16", "level": "attn"},
    "apollo int8": {"method": "apollo", "moments": "8bit", "weights": "int8"},
    "apollo_mini int8": {"method": "apollo_mini", "moments": "fp32", "weights": "int8"},
    "apollo_mini keep": {"method": "apollo_mini", "moments": "fp32", "level": "keep"},
    "galore summed": {
        "method": "galore",
        "moments": "8bit",
        "mode": "fused+subspace",
        "micro_batches": 2,
    },
    "galore projected": {
        "method": "galore",
        "moments": "8bit",
        "mode": "fused+subspace",
        "weights": "int8",
    },
    "adamw summed": {"method": "adamw", "moments": "8bit", "mode": "unfused", "micro_batches": 2},
    "adamw whole": {"method": "adamw", "moments": "8bit", "mode": "unfused"},
    "fira summed": {"method": "fira", "moments": "8bit", "mode": "unfused", "micro_batches": 2},
}

QUICK = [
    ("60m", "adamw keep"),
    ("60m", "galore summed"),
    ("130m", "adamw whole"),
    ("130m", "fira"),
    ("7b", "galore"),
    ("7b", "apollo int8"),
    ("llama3-8b", "adamw 8bit"),
]
ALL = [(size, name) for size in BATCHES for name in CASES if (size, name) not in QUICK]


def case_of(size: str, name: str) -> Case:
    sequences, length, rank = BATCHES[size]
    fields = CASES[name]
    rank = {"adamw": 0, "apollo_mini": 1}.get(fields["method"], rank)
    rest = "fp32" if name == "adamw keep" else "8bit"
    return Case(model_named(size), sequences, length, rank=rank, rest=rest, **fields)


def choice_of(case: Case) -> Choice:
    return Choice(
        case.method,
        case.rank or None,
        case.moments,
        case.weights,  # type: ignore[arg-type]
        case.mode,  # type: ignore[arg-type]
        case.level,
        case.sequences,
        case.micro_batches,
        None,
    )


def agree(size: str, name: str) -> None:
    case = case_of(size, name)
    options = {"solver": "svd"} if case.svd else {}
    kept, most = planned(case.model, choice_of(case), case.length, case.rest, **options)
    assert kept == persistent(case)
    wanted, instant = peak(case)
    assert most == pytest.approx(wanted, rel=TOLERANCE), instant


@pytest.mark.parametrize(("size", "name"), QUICK)
def test_planned_bytes_follow_the_closed_forms(size: str, name: str) -> None:
    agree(size, name)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), ALL)
def test_planned_bytes_follow_the_closed_forms_everywhere(size: str, name: str) -> None:
    agree(size, name)
