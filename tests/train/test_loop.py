"""The loop against transformers and torch, and against itself with other micro-batches."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus
from lowmem.errors import DataError, DivergedError, OutOfMemoryError
from lowmem.model.llama import Llama
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.tensorfile import read_tensors
from lowmem.train.build import build
from lowmem.train.events import Eased, Evaluated, Event, Finished, Grown, Measured, Started
from lowmem.train.loop import train
from lowmem.train.run import Run
from lowmem.train.schedule import learning_rate
from lowmem.train.watch import DeviceReading, Watch
from lowmem.units import GIB

MakeConfig = Callable[..., Config]


def planned_run(config: Config, corpus: Corpus, name: str = "a") -> tuple[Run, list[Event]]:
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    plan = make_plan(config, find_card("24GB", "cpu"), [])
    run = Run.create(plan.config, plan.to_json())
    events: list[Event] = []
    train(run, corpus, events.append, plan)
    return run, events


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(read_tensors(run.latest() / "model" / "model.safetensors"))


def test_training_equals_transformers_with_torch_adamw(
    tiny_config: MakeConfig, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """Same weights, batches, clipping and rates: an independent loop gives the same losses."""
    from transformers import AutoModelForCausalLM

    from lowmem.model.huggingface import save_folder

    config = tiny_config(
        optimizer={"method": "adamw", "lr": 0.01, "weight_decay": 0.1},
        train={"updates": 8, "clip": 0.7},
    )
    run, _ = planned_run(config, tiny_corpus)
    start, _ = build(run.config)
    start.initialise(run.config.train.seed)
    save_folder(start, tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    assert tiny_corpus.train is not None
    batches = Batches(tiny_corpus.train, seq_len=32, rows_per_update=8, seed=0)
    expected = []
    for update in range(8):
        rows = batches.of(update).rows
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, 0.01, update, 8)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    # 8 updates in float32: Adam's division amplifies the last bits of small gradients.
    assert losses(run) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [
        ("unfused", {"method": "adamw"}),
        ("unfused", {"method": "galore", "rank": 8}),
        ("fused+subspace", {"method": "adamw"}),
        # Not galore in fused+subspace: its basis is that of the first micro-batch. That sums add up
        # there is proven in tests/optim/test_every_method.py.
    ],
)
def test_micro_batch_size_does_not_change_the_update(
    mode: str, optimizer: dict[str, Any], tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    seen = {}
    for micro in (8, 3, 1):
        config = tiny_config(
            optimizer=optimizer | {"lr": 0.003},
            train={"update": mode, "micro_batch": micro, "updates": 4},
        )
        run, _ = planned_run(config, tiny_corpus, f"micro{micro}")
        seen[micro] = losses(run)
    # Sums in another order: 4 updates in float32.
    assert seen[3] == pytest.approx(seen[8], abs=1e-4)
    assert seen[1] == pytest.approx(seen[8], abs=1e-4)


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace", "fused"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_measured_peak_of_the_first_update_is_the_planned_one(
    mode: str, weights: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    config = tiny_config(
        optimizer={"method": "galore", "rank": 8, "states": "8bit"},
        train={"update": mode, "weights": weights, "updates": 2},
    )
    _, events = planned_run(config, tiny_corpus)
    (measured,) = [event for event in events if isinstance(event, Measured)]
    assert measured.measured == measured.planned
    names = [part.name for part in measured.parts]
    assert names == ["weights", "states", "projections", "all else at the peak"]
    assert all(part.measured == part.planned > 0 for part in measured.parts)
    assert sum(part.planned for part in measured.parts) == measured.planned


def test_what_a_run_reports_and_leaves(tiny_config: MakeConfig, tiny_corpus: Corpus) -> None:
    run, events = planned_run(tiny_config(evaluate={"every": 2, "tokens": 1000}), tiny_corpus)
    assert isinstance(events[0], Started)
    finished = events[-1]
    assert isinstance(finished, Finished)
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    assert [event.update for event in evaluations] == [1, 3, 5]
    assert evaluations[-1].eval_loss == finished.eval_loss < evaluations[0].eval_loss
    lines = list(run.metrics())
    assert [line["update"] for line in lines if "loss" in line] == list(range(6))
    assert lines[0].keys() >= {"update", "loss", "lr", "tokens", "grad_norm", "memory_bytes"}
    assert lines[0]["tokens"] == 8 * 32
    folder = run.folder
    assert (folder / "latest").read_text() == "step-000006\n"
    assert json.loads((folder / "plan.json").read_text())["fits"] is True
    assert Run.open(folder).config == run.config
    assert finished.unigram_loss > 3


def test_a_diverging_run_stops_before_the_weights_change(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.train import loop

    def poisoned(*arguments: Any, **options: Any) -> Any:
        loss, norm = gather(*arguments, **options)
        return loss * float("nan"), norm

    gather = loop.gather
    monkeypatch.setattr(loop, "gather", poisoned)
    with pytest.raises(DivergedError, match="update 0: loss nan"):
        planned_run(tiny_config(guard={"skips": 0, "rollbacks": 0}), tiny_corpus)
    with pytest.raises(DivergedError, match="loss nan"):  # however patient: no update was good
        planned_run(tiny_config(), tiny_corpus, "patient")


def test_a_corpus_of_validation_files_cannot_be_trained_on(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    from dataclasses import replace

    with pytest.raises(DataError, match="no training part"):
        planned_run(tiny_config(), replace(tiny_corpus, train=None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["unfused", "fused+subspace", "fused"])
def test_a_card_trains_within_the_planned_memory(
    mode: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    """Reserved memory beside the plan, for a model that is large enough to measure."""
    from lowmem.config.presets import read_preset

    config = tiny_config(
        model=read_preset("llama-60m").model_dump(),
        optimizer={"method": "galore", "states": "8bit"},
        train={"device": "cuda", "update": mode, "updates": 2, "weights": "bf16"},
    )
    plan = make_plan(config, find_card("24GB", "cuda"), [])
    run = Run.create(plan.config, plan.to_json())
    events: list[Event] = []
    train(run, tiny_corpus, events.append, plan)
    (measured,) = [event for event in events if isinstance(event, Measured)]
    # The aim of docs/memory.md: within 2 %, never under by more than 1 %.
    assert measured.measured <= 1.01 * measured.planned
    assert measured.measured >= 0.98 * measured.planned


def test_running_out_of_memory_is_told(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it happened, planned beside measured by category, and three changes that help."""
    plain = Llama.hand

    def full(self: Llama, name: str, gradient: torch.Tensor) -> None:
        if name.endswith("layers.0.mlp.up_proj.weight") and not gradient.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        plain(self, name, gradient)

    monkeypatch.setattr(Llama, "hand", full)
    config = tiny_config(optimizer={"method": "galore", "rank": 16})
    with pytest.raises(OutOfMemoryError) as caught:
        planned_run(config, tiny_corpus)
    error = caught.value
    assert error.exit_code == 7
    assert error.what == (
        "the device ran out of memory although the plan fitted, "
        "backward of block 1, gradient of mlp.up"
    )
    reason, tried, saved, head, *rows = error.why.splitlines()
    assert tried.startswith("tried: slices of vocabulary and weights are 4 times smaller")
    assert saved == "no update was half made, and everything is saved"
    assert reason == "CUDA out of memory. Tried to allocate 2 GiB"
    assert head.split() == ["planned", "measured"]
    table = {name: rest.split("  ") for name, _, rest in (row.partition("  ") for row in rows)}
    for name in ("weights", "states", "projections"):
        planned, measured = [word.strip() for word in table[name] if word.strip()]
        assert planned == measured  # exactly, of what persists
    assert table["all else at the peak"][-1] == "not measured"
    advice, *fixes = error.fix.splitlines()
    assert "close what else uses the card" in advice
    assert len(fixes) == 3
    assert all(fix.startswith("--") for fix in fixes)
    assert all(re.search(r"-[0-9.]+ [KM]iB$", fix) for fix in fixes)


def test_a_resumed_run_explains_itself_by_the_plan_in_its_folder(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = planned_run(tiny_config(optimizer={"method": "galore", "rank": 16}), tiny_corpus)
    longer = run.config.model_copy(
        update={"train": run.config.train.model_copy(update={"updates": 8})}
    )

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lowmem.train.loop.gather", full)
    with pytest.raises(OutOfMemoryError) as caught:
        train(Run(run.folder, longer), tiny_corpus, lambda event: None)
    assert "weights" in caught.value.why
    (run.folder / "plan.json").unlink()
    with pytest.raises(OutOfMemoryError, match="between phases") as caught:
        train(Run(run.folder, longer), tiny_corpus, lambda event: None)
    assert "no plan of this run is known" in caught.value.why


def test_a_card_that_fills_up_is_told_once(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a device that says so: another program takes 20 GiB of a 24 GiB card."""
    full = DeviceReading(total=24 * GIB, free=2 * GIB, reserved=0)
    monkeypatch.setattr("lowmem.train.watch.EVERY", 2)
    monkeypatch.setattr(Watch, "over", lambda plan, device, cap: Watch(plan, lambda: full, cap))
    run, events = planned_run(tiny_config(), tiny_corpus)
    (grown,) = [event for event in events if isinstance(event, Grown)]
    assert (grown.update, grown.whose) == (1, "others")
    eased = [event for event in events if isinstance(event, Eased)]
    assert [(event.update, event.step, event.where) for event in eased] == [
        (1, "slices", ""),  # before anything has failed
        (1, "logits", ""),
    ]
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [line["whose"] for line in lines if line["event"] == "grown"] == ["others"]
