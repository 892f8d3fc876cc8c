"""Events: their names and keys are what scripts and trackers read, so they never change."""

import json
import math
from dataclasses import fields
from typing import Any, get_args

import pytest

from lowmem.train.events import (
    Assigned,
    Capped,
    Continued,
    Converted,
    ConvertedPart,
    Diagnosed,
    Eased,
    Evaluated,
    Event,
    Finished,
    Group,
    Grown,
    Measured,
    Part,
    Paused,
    RolledBack,
    Saved,
    Skipped,
    Started,
    Stopping,
    Storage,
    Trained,
    Tried,
    perplexity,
    to_record,
)

RECORDS: list[tuple[Event, dict[str, Any]]] = [
    (
        Trained(3, 4.5, 0.01, 1024, 0.7, "gradient", 0.5, 512.0, 10**9),
        {
            "update": 3,
            "loss": 4.5,
            "lr": 0.01,
            "tokens": 1024,
            "grad_norm": 0.7,
            "norm_of": "gradient",
            "seconds": 0.5,
            "tokens_per_second": 512.0,
            "memory_bytes": 10**9,
        },
    ),
    (
        Evaluated(3, 4.5, 2000, 0.5, 4.4),
        {
            "update": 3,
            "eval_loss": 4.5,
            "eval_tokens": 2000,
            "seconds": 0.5,
            "published_loss": 4.4,
            "best": False,
        },
    ),
    (
        Diagnosed(3, {"energy": 0.5, "overlap": None}),
        {"update": 3, "diagnostics": {"energy": 0.5, "overlap": None}},
    ),
    (
        Assigned([Group("attention, mlp", 14, 1000, "Projected: SVD(rank=4)")]),
        {
            "event": "assigned",
            "groups": [
                {
                    "roles": "attention, mlp",
                    "weights": 14,
                    "elements": 1000,
                    "method": "Projected: SVD(rank=4)",
                }
            ],
        },
    ),
    (
        Started(4, 10, 256, "runs/a", "runs/a/checkpoints/step-000004"),
        {
            "event": "started",
            "update": 4,
            "updates": 10,
            "tokens_per_update": 256,
            "folder": "runs/a",
            "resumed_from": "runs/a/checkpoints/step-000004",
            "bits_differ_by": [],
        },
    ),
    (
        Storage(1000, 3, 10**6, 0, "checkpoint.behind = false"),
        {
            "event": "storage",
            "checkpoint": 1000,
            "kept": 3,
            "free": 10**6,
            "host_copy": 0,
            "why": "checkpoint.behind = false",
        },
    ),
    (
        Skipped(4, "loss nan", False, ["train-00000.bin at token 32"]),
        {
            "event": "skipped",
            "update": 4,
            "why": "loss nan",
            "made": False,
            "sequences": ["train-00000.bin at token 32"],
        },
    ),
    (
        RolledBack(100, "loss nan", 120, 140, 1, 3),
        {
            "event": "rolledback",
            "update": 100,
            "why": "loss nan",
            "first": 120,
            "last": 140,
            "number": 1,
            "of": 3,
        },
    ),
    (Paused("the disk is full"), {"event": "paused", "why": "the disk is full"}),
    (Continued(1.5), {"event": "continued", "seconds": 1.5}),
    (
        Saved(4, "runs/a/checkpoints/step-000004", 1000, 0.5, 0.1),
        {
            "event": "saved",
            "update": 4,
            "path": "runs/a/checkpoints/step-000004",
            "bytes": 1000,
            "seconds": 0.5,
            "blocked": 0.1,
        },
    ),
    (
        Measured("tensors", 100, 99, [Part("weights", 60, 60)]),
        {
            "event": "measured",
            "what": "tensors",
            "planned": 100,
            "measured": 99,
            "parts": [{"name": "weights", "planned": 60, "measured": 60}],
        },
    ),
    (
        Grown(49, "others", 300, 1001),
        {"event": "grown", "update": 49, "whose": "others", "planned": 300, "measured": 1001},
    ),
    (
        Converted(6, [ConvertedPart("weights", False, 0.01, "fp32 -> int8")]),
        {
            "event": "converted",
            "update": 6,
            "parts": [
                {"part": "weights", "exact": False, "error": 0.01, "becomes": "fp32 -> int8"}
            ],
        },
    ),
    (Stopping("SIGTERM"), {"event": "stopping", "signal": "SIGTERM"}),
    (
        Finished(10, 4.5, 6.5, 2560, 9.0, "runs/a/checkpoints/step-000010"),
        {
            "event": "finished",
            "update": 10,
            "eval_loss": 4.5,
            "unigram_loss": 6.5,
            "tokens": 2560,
            "seconds": 9.0,
            "checkpoint": "runs/a/checkpoints/step-000010",
            "published_loss": None,
            "eased": [],
        },
    ),
    (
        Capped(10**10, 2**26, "rtx3060-12gb"),
        {"event": "capped", "budget": 10**10, "ballast": 2**26, "card": "rtx3060-12gb"},
    ),
    (Tried(2.5), {"event": "tried", "seconds": 2.5}),
    (
        Eased(3, "recompute", "recompute keep -> attn", "loss", "CUDA out of memory"),
        {
            "event": "eased",
            "update": 3,
            "step": "recompute",
            "said": "recompute keep -> attn",
            "where": "loss",
            "reason": "CUDA out of memory",
        },
    ),
]


@pytest.mark.parametrize(
    ("event", "record"), RECORDS, ids=[type(event).__name__ for event, _ in RECORDS]
)
def test_records_have_their_stable_keys(event: Event, record: dict[str, Any]) -> None:
    assert to_record(event) == record
    assert json.loads(json.dumps(to_record(event))) == record


def test_every_event_is_pinned() -> None:
    assert {type(event) for event, _ in RECORDS} == set(get_args(Event))


def test_metrics_are_told_apart_by_one_key_each() -> None:
    """The kinds share a file without naming themselves."""
    kinds = [{field.name for field in fields(c)} for c in (Trained, Evaluated, Diagnosed)]
    for own, key in zip(kinds, ("loss", "eval_loss", "diagnostics"), strict=True):
        assert [key in names for names in kinds] == [names is own for names in kinds]


@pytest.mark.parametrize("loss", [0.0, 1.0, 11.5, 690.0])
def test_perplexity_is_the_exponential_of_the_loss(loss: float) -> None:
    assert math.log(perplexity(loss)) == pytest.approx(loss)


@pytest.mark.parametrize("loss", [710.0, 1e4, math.inf])
def test_perplexity_beyond_a_float_is_infinite(loss: float) -> None:
    assert perplexity(loss) == math.inf
