"""What methods say of themselves in a run."""

import json
from collections.abc import Callable

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.optim.bases import Basis
from lowmem.train import diagnose
from lowmem.train.build import build
from lowmem.train.diagnose import assigned, diagnosed
from lowmem.train.events import Assigned, Diagnosed, Event
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]


def run_of(config: Config, corpus: Corpus) -> tuple[Run, list[Event]]:
    run, events = Run.create(config, None), list[Event]()
    train(run, corpus, events.append)
    return run, events


def test_every_weight_is_told_once_by_its_method(ready_config: MakeConfig) -> None:
    model, optimizer = build(ready_config())
    groups = assigned(optimizer, model.roles()).groups
    by_roles = {group.roles: group for group in groups}
    main, rest = by_roles["attention, mlp"], by_roles["embedding, norm, head"]
    assert (main.weights, rest.weights) == (2 * 7, 2 + 2 * 2 + 1)
    assert main.elements == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 88)
    assert main.elements + rest.elements == sum(p.numel() for p in model.parameters())
    assert main.method.startswith("Projected: SVD(rank=4, ")
    assert "ProjectBack(scale=0.25)" in main.method
    assert rest.method.startswith("Dense: Adam(")


def test_ranks_by_role_are_told_apart(ready_config: MakeConfig) -> None:
    config = ready_config(optimizer={"rank": {"attention": 2, "mlp": 8}})
    model, optimizer = build(config)
    groups = assigned(optimizer, model.roles()).groups
    ranks = {
        g.roles: g.method.split("rank=")[1].split(",")[0] for g in groups if "rank" in g.method
    }
    assert ranks == {"attention": "2", "mlp": "8"}


def test_apollo_tells_alpha_and_scale(ready_config: MakeConfig) -> None:
    model, optimizer = build(ready_config(optimizer={"method": "apollo", "alpha": 2.0}))
    methods = [group.method for group in assigned(optimizer, model.roles()).groups]
    assert any("alpha=2.0" in method and "scale=4.0" in method for method in methods)


def test_figures_are_recorded_at_the_interval_and_with_evaluations(
    ready_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnose, "EVERY", 4)
    config = ready_config(train={"updates": 7}, evaluate={"every": 3, "tokens": 200})
    run, events = run_of(config, tiny_corpus)
    assert isinstance(events[2], Assigned)
    assert [event.update for event in events if isinstance(event, Diagnosed)] == [2, 3, 5, 6]
    lines = [line for line in run.metrics() if "diagnostics" in line]
    assert [line["update"] for line in lines] == [2, 3, 5, 6]
    figures = lines[-1]["diagnostics"]
    assert 0 < figures["energy"] < 1
    assert figures["kept_bases"] == 0


def test_a_method_without_figures_records_none(
    ready_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    config = ready_config(optimizer={"method": "adamw", "rank": "auto"}, train={"updates": 2})
    _, events = run_of(config, tiny_corpus)
    assert not any(isinstance(event, Diagnosed) for event in events)


def test_bases_that_were_kept_are_counted_over_all_matrices(
    ready_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decomposition of this run fails: 14 matrices, refreshed at updates 0 and 2."""

    def failing(grad: torch.Tensor, right: bool, rank: int, *rest: object) -> Basis:
        side = grad.shape[1] if right else grad.shape[0]
        return torch.zeros(side, rank), torch.zeros((), dtype=torch.bool)

    monkeypatch.setattr("lowmem.optim.projectors.leading_basis", failing)
    optimizer = {"options": {"gap": 2, "staggered": False}}
    _, events = run_of(ready_config(optimizer=optimizer, train={"updates": 4}), tiny_corpus)
    last = [event for event in events if isinstance(event, Diagnosed)][-1]
    assert last.diagnostics["kept_bases"] == 14 * 2


def test_what_is_no_number_is_recorded_as_none(ready_config: MakeConfig) -> None:
    """A zero gradient has no share of energy; NaN would be no JSON."""
    _, optimizer = build(ready_config())
    optimizer.begin(0.0, 1)
    for name, slot in optimizer.slots.items():
        optimizer.receive(name, torch.zeros_like(slot.weight))
    optimizer.step()
    event = diagnosed(0, optimizer)
    assert event is not None
    assert event.diagnostics["energy"] is None
    assert "NaN" not in json.dumps(event.diagnostics)
