"""The trial before a run: it sees what the run will meet, and leaves nothing behind."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.errors import OutOfMemoryError
from lowmem.phases import current_phase
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.tensorfile import read_tensors
from lowmem.train.events import Event, Started, Tried
from lowmem.train.loop import train
from lowmem.train.run import Run
from lowmem.train.trial import is_wanted
from tests.train.faults import Faults

MakeConfig = Callable[..., Config]


def new_run(make: MakeConfig, name: str, trial: str, **sections: Any) -> Run:
    train = {"updates": 2, "trial": trial} | sections.pop("train", {})
    config = make(train=train, checkpoint={"behind": False}, **sections)
    return Run.create(
        config.model_copy(update={"run": config.run.model_copy(update={"name": name})}), None
    )


def trained(run: Run, corpus: Corpus) -> list[Event]:
    events: list[Event] = []
    train(run, corpus, events.append)
    return events


@pytest.mark.parametrize(
    ("optimizer", "train"),
    [
        ({"method": "galore", "states": "8bit"}, {"micro_batch": 4, "update": "fused+subspace"}),
        ({"method": "frugal", "rank": "auto", "projection": "blocks"}, {"update": "fused"}),
        ({"method": "sophia", "rank": "auto"}, {}),
        ({"method": "q_galore"}, {"weights": "int8"}),
    ],
)
def test_a_trial_changes_nothing(
    optimizer: dict[str, Any], train: dict[str, Any], ready_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    """Weights, states and figures bit for bit, and torch's own generator."""
    contents = []
    for trial in ("off", "on"):
        run = new_run(ready_config, trial, trial, optimizer=optimizer, train=train)
        torch.manual_seed(3)
        events = trained(run, tiny_corpus)
        assert isinstance(events[0], Tried) == (trial == "on")
        files = sorted(run.latest().rglob("*.safetensors"))
        tensors = {f"{f.name}/{key}": value for f in files for key, value in read_tensors(f)}
        losses = [line["loss"] for line in run.metrics() if "loss" in line]
        contents.append((tensors, losses, torch.initial_seed(), torch.rand(1).item()))
        assert not list(run.folder.glob(".trial*"))
    (one, *figures), (other, *others) = contents
    assert figures == others
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def failing_in(phase: str) -> Iterator[Faults]:
    with Faults(lambda number: phase in current_phase()) as faults:
        yield faults


def test_what_does_not_fit_is_told_before_anything_is_made(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    config = tiny_config(optimizer={"method": "galore", "rank": 8}, train={"trial": "on"})
    plan = make_plan(config, find_card("24GB", "cpu"), [])
    for phase in ("loss", "refresh", "evaluation"):
        named = plan.config.run.model_copy(update={"name": phase})
        run = Run.create(plan.config.model_copy(update={"run": named}), plan.to_json())
        events: list[Event] = []
        with failing_in(phase), pytest.raises(OutOfMemoryError) as caught:
            train(run, tiny_corpus, events.append, plan)
        assert caught.value.exit_code == 7
        assert "trial before the run" in caught.value.what
        assert phase in caught.value.what
        assert "planned" in caught.value.why
        assert "--" in caught.value.fix
        assert not [event for event in events if isinstance(event, Started)]
        assert not run.has_checkpoint
        assert run.metrics() == []


def test_a_resumed_run_is_tried_as_it_will_go_on(
    ready_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the steps that stand in its checkpoint."""
    run = new_run(ready_config, "a", "on", train={"recompute": "keep", "micro_batch": 4})
    trained(run, tiny_corpus)
    path = run.latest() / "state.json"
    state = json.loads(path.read_text())
    state["carried"]["ladder"] = {
        "slices": 4,
        "logits": False,
        "recompute": "full",
        "micro_batch": 2,
        "evaluation": 4,
        "boundaries": "keep",
        "prepared": [],
    }
    monkeypatch.setattr("lowmem.train.checkpoint.verify", lambda folder: None)
    path.write_text(json.dumps(state))
    seen: list[tuple[str, int]] = []

    def try_out(config: Config, model: Any, optimizer: Any, rows: int, folder: Path) -> None:
        seen.append((model.recompute, rows))

    monkeypatch.setattr("lowmem.train.loop.try_out", try_out)
    longer = run.config.model_copy(
        update={"train": run.config.train.model_copy(update={"updates": 3})}
    )
    trained(Run(run.folder, longer), tiny_corpus)
    assert seen == [("full", 2)]


@pytest.mark.parametrize(
    ("trial", "device", "wanted"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_a_trial_is_for_cards_unless_somebody_says_so(
    trial: str, device: str, wanted: bool, ready_config: MakeConfig
) -> None:
    assert is_wanted(ready_config(train={"trial": trial, "device": device})) == wanted
