"""Runs whose method follows the curvature: planned, trained, cut and continued."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.errors import Stopped
from lowmem.planner.best import search
from lowmem.planner.fixes import _variations
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job
from lowmem.planner.search import make_plan
from lowmem.planner.settings import least
from lowmem.tensorfile import sha256_of
from lowmem.train.events import Event, Finished, Measured, Trained
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]
# Interval and options; 6 updates are cut after the third, within an interval.
METHODS: dict[str, dict[str, Any]] = {
    "sophia": {"method": "sophia", "gap": 4, "lr": 0.003, "gamma": 1.0},
    "sophia-8bit": {"method": "sophia", "gap": 2, "lr": 0.003, "states": "8bit", "min_8bit": 0},
    "adahessian": {"method": "adahessian", "gap": 2, "lr": 0.1},
    "galore-sophia": {
        "method": "galore",
        "rank": 8,
        "lr": 0.003,
        "rest": {"method": "sophia", "options": {"gap": 4}},
    },
}


def stop_after(update: int) -> Callable[[Event], None]:
    """A report that sends this process a SIGTERM when that update has been made."""

    def report(event: Event) -> None:
        if isinstance(event, Trained) and event.update == update:
            signal.raise_signal(signal.SIGTERM)

    return report


def silent(event: Event) -> None:
    """No console."""


def told(run: Run) -> tuple[list[Any], list[str]]:
    """Losses and norms of the log, and the hashes of the newest checkpoint."""
    lines = [
        (line.get("update"), line.get("loss"), line.get("grad_norm")) for line in run.metrics()
    ]
    return lines, [sha256_of(path) for path in sorted(run.latest().rglob("*.safetensors"))]


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("sophia", "bf16"),
        ("sophia-8bit", "fp32"),
        ("adahessian", "fp32"),
        ("galore-sophia", "bf16"),
    ],
)
def test_a_run_cut_within_an_interval_continues_bit_for_bit(
    method: str, weights: str, ready_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    config = ready_config(
        optimizer={"rank": "auto", **METHODS[method]},
        train={"weights": weights, "micro_batch": 3, "clip": 0.5},
    )
    runs = {}
    for name in ("whole", "cut"):
        own = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        runs[name] = Run.create(own, None)
    train(runs["whole"], tiny_corpus, silent)
    with pytest.raises(Stopped):
        train(runs["cut"], tiny_corpus, stop_after(2))
    train(Run.open(runs["cut"].folder), tiny_corpus, silent)
    assert told(runs["cut"]) == told(runs["whole"])


@pytest.mark.parametrize("method", ["sophia", "adahessian", "galore-sophia"])
def test_a_plan_that_does_not_fit_proposes_only_what_can_be_done(
    method: str, tiny_config: MakeConfig
) -> None:
    """Each proposal is rehearsed, and other modes or weights would raise there."""
    config = tiny_config(optimizer=METHODS[method], train={"device": "cuda", "weights": "fp32"})
    job = Job.of(config, find_card("24GB", "cuda"))
    assert search(job, room=1000)[1] is None
    choice = least(job)
    proposed = dict(_variations(job, choice))
    assert proposed
    assert all(job.peak(other) > 0 for other in proposed.values())
    assert not any("fused" in flags.split() for flags in proposed)
    assert ("--weights bf16" in proposed) == (method != "adahessian")


@pytest.mark.parametrize("method", ["sophia", "adahessian", "galore-sophia"])
def test_the_loss_falls_within_the_planned_memory(
    method: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    config = tiny_config(
        optimizer=METHODS[method], train={"micro_batch": 4, "weights": "fp32", "updates": 12}
    )
    plan = make_plan(config, find_card("24GB", "cpu"), [])
    assert plan.config.train.update == "unfused"
    events: list[Event] = []
    train(Run.create(plan.config, plan.to_json()), tiny_corpus, events.append, plan)
    (measured,) = [event for event in events if isinstance(event, Measured)]
    assert measured.measured == measured.planned
    losses = [event.loss for event in events if isinstance(event, Trained)]
    assert losses[-1] < losses[0] - 0.3
    assert isinstance(events[-1], Finished)
