"""A run that was cut continues bit for bit, whatever its method, formats and update mode."""

import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import MOVE_EARLY, Config
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError, DataError, Stopped
from lowmem.optim import methods as all_methods
from lowmem.tensorfile import sha256_of
from lowmem.train.events import Event, Started, Trained
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"method": "adamw", "weight_decay": 0.1},
    "adamw-bf16": {"method": "adamw", "states": "bf16"},
    "adam8bit": {"method": "adam8bit", "min_8bit": 0},
    "galore": {"method": "galore", "rank": 8, "gap": 4},
    "galore-bf16": {"method": "galore", "rank": 8, "gap": 4, "states": "bf16"},
    "galore-8bit": {"method": "galore", "rank": 8, "gap": 4, "states": "8bit", "min_8bit": 0},
}


def ready(config: Config) -> Config:
    """`config` with what the planner would fill in, for want of a second per test."""
    train, optimizer = config.train, config.optimizer
    filled = {
        "micro_batch": 8 if train.micro_batch == "auto" else train.micro_batch,
        "update": "unfused" if train.update == "auto" else train.update,
        "recompute": "full" if train.update == "layer-major" else "attn",
        "clip": "off" if train.update in MOVE_EARLY else 0.5,
    }
    method = "adamw" if optimizer.method == "auto" else optimizer.method
    return config.model_copy(
        update={
            "train": train.model_copy(update=filled),
            "optimizer": optimizer.model_copy(update={"method": method, "lr": 0.01}),
        }
    )


def in_folder(config: Config, name: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def stop_after(update: int) -> Callable[[Event], None]:
    """A report that sends this process a SIGTERM when that update has been made."""

    def report(event: Event) -> None:
        if isinstance(event, Trained) and event.update == update:
            signal.raise_signal(signal.SIGTERM)

    return report


def silent(event: Event) -> None:
    """No console."""


def told(run: Run) -> list[tuple[Any, ...]]:
    """What must be equal, line by line; speed, memory and times may differ."""
    keys = ("update", "loss", "lr", "tokens", "eval_loss", "grad_norm", "diagnostics")
    return [tuple(line.get(key) for key in keys) for line in run.metrics()]


def hashes(run: Run) -> dict[str, str]:
    """sha256 of weights and optimizer states of the newest checkpoint."""
    files = sorted(run.latest().rglob("*.safetensors"))
    return {path.name: sha256_of(path) for path in files}


MODES = ("unfused", "fused+subspace", "fused", "layer-major")


def check_a_cut_changes_nothing(config: Config, corpus: Corpus) -> None:
    """Stopped after three updates and resumed, a run has the same losses and files."""
    whole = Run.create(in_folder(config, "whole"), None)
    train(whole, corpus, silent)
    cut = Run.create(in_folder(config, "cut"), None)
    with pytest.raises(Stopped, match="SIGTERM after 3 updates"):
        train(cut, corpus, stop_after(2))
    train(Run.open(cut.folder), corpus, silent)
    assert told(cut) == told(whole)
    assert hashes(cut) == hashes(whole)


CASES = [  # of codes one method is enough for every day, and of the last mode bf16
    pytest.param(*case, marks=pytest.mark.slow)
    if (case[2] == "int8" and case[0] != "galore-8bit")
    or (case[1] == "layer-major" and case[2] != "bf16")
    else case
    for case in itertools.product(METHODS, MODES, ("fp32", "bf16", "int8"))
]


@pytest.mark.parametrize(("method", "mode", "weights"), CASES)
def test_resume_continues_bit_for_bit(
    method: str, mode: str, weights: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    how: dict[str, Any] = {"update": mode, "weights": weights}
    if mode != "fused":
        how["micro_batch"] = 3  # 3 + 3 + 2 sequences
    optimizer = METHODS[method]
    if mode == "layer-major":
        how |= {"boundaries": "host", "blocks": "host"}
        optimizer = {**optimizer, "place": "host"}
    if mode == "fused+subspace":
        how["boundaries"] = "host"
    config = ready(
        tiny_config(optimizer=optimizer, train=how, evaluate={"tokens": 500, "every": 2})
    )
    whole = Run.create(in_folder(config, "whole"), None)
    train(whole, tiny_corpus, silent)
    cut = Run.create(in_folder(config, "cut"), None)
    with pytest.raises(Stopped, match="SIGTERM after 3 updates"):
        train(cut, tiny_corpus, stop_after(2))
    train(Run.open(cut.folder), tiny_corpus, silent)
    assert told(cut) == told(whole)
    figures = 3 if method.startswith("galore") else 0  # with every evaluation
    assert len(told(whole)) == 6 + 3 + figures
    assert hashes(cut) == hashes(whole)


@pytest.mark.parametrize("method", sorted(all_methods.METHODS.keys() - METHODS.keys()))
def test_every_method_resumes_bit_for_bit(
    method: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    """In the middle of its gap, if it has one; FRUGAL's blocks have changed by then."""
    arguments = all_methods.method_spec(method).arguments
    small = {"rank": 4, "gap": 2, "history": 3}
    settings = {key: value for key, value in small.items() if key in arguments}
    how = {"weights": "fp32" if method == "adahessian" else "bf16"}
    config = ready(tiny_config(optimizer={"method": method} | settings, train=how))
    check_a_cut_changes_nothing(config, tiny_corpus)


@pytest.mark.parametrize(
    ("sums", "mode", "method", "weights"),
    [
        ("bf16", "unfused", "adamw", "bf16"),
        ("int8", "unfused", "adam8bit", "int8"),
        ("int8", "fused+subspace", "galore", "bf16"),
        ("host", "fused+subspace", "galore-8bit", "fp32"),
    ],
)
def test_sums_of_every_format_resume_bit_for_bit(
    sums: str,
    mode: str,
    method: str,
    weights: str,
    tiny_config: MakeConfig,
    tiny_corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lowmem.optim.sums.LEAST_ELEMENTS", 1)
    how = {"update": mode, "weights": weights, "micro_batch": 3}

    def run(name: str, sums: str) -> Run:
        config = tiny_config(optimizer=METHODS[method], train=how | {"sums": sums})
        return Run.create(in_folder(ready(config), name), None)

    whole, cut, exact = run("whole", sums), run("cut", sums), run("exact", "fp32")
    train(whole, tiny_corpus, silent)
    with pytest.raises(Stopped, match="SIGTERM after 3 updates"):
        train(cut, tiny_corpus, stop_after(2))
    train(Run.open(cut.folder), tiny_corpus, silent)
    assert told(cut) == told(whole)
    assert hashes(cut) == hashes(whole)
    train(exact, tiny_corpus, silent)
    assert (told(whole) == told(exact)) == (sums == "host")
    assert (hashes(whole) == hashes(exact)) == (sums == "host")


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tiny_config: MakeConfig, tiny_corpus: Corpus) -> None:
    how = {"compile": True, "micro_batch": 3}  # 3 + 3 + 2 sequences
    config = ready(tiny_config(optimizer={"method": "adamw"}, train=how))
    check_a_cut_changes_nothing(config, tiny_corpus)


@pytest.mark.parametrize("rest", ["adam8bit", "apollo_mini"])
@pytest.mark.parametrize("mode", MODES)
def test_ends_in_codes_resume_bit_for_bit(
    mode: str, rest: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    how = {"update": mode, "weights": "int8", "ends": "int8"}
    optimizer = {"method": "apollo_mini", "gap": 2, "rest": {"method": rest}}
    config = ready(tiny_config(optimizer=optimizer, train=how))
    check_a_cut_changes_nothing(config, tiny_corpus)


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_products_in_8_bits_resume_bit_for_bit(
    matmul: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    config = ready(tiny_config(train={"matmul": matmul}))
    whole = Run.create(in_folder(config, "whole"), None)
    train(whole, tiny_corpus, silent)
    cut = Run.create(in_folder(config, "cut"), None)
    with pytest.raises(Stopped, match="SIGTERM after 3 updates"):
        train(cut, tiny_corpus, stop_after(2))
    train(Run.open(cut.folder), tiny_corpus, silent)
    assert told(cut) == told(whole)
    assert hashes(cut) == hashes(whole)
    exact = Run.create(in_folder(ready(tiny_config()), "exact"), None)
    train(exact, tiny_corpus, silent)
    assert hashes(exact) != hashes(whole)


def test_what_changes_bits_is_told_when_a_run_goes_on(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels and threads sum in another order; nothing is said where nothing changed."""
    config = ready(tiny_config(checkpoint={"every": 3, "keep": 9}))
    run = Run.create(config, None)
    train(run, tiny_corpus, silent)

    def told() -> list[str]:
        events: list[Event] = []
        train(Run.open(run.folder / "checkpoints" / "step-000003"), tiny_corpus, events.append)
        (started,) = (event for event in events if isinstance(event, Started))
        return started.bits_differ_by

    assert told() == []
    monkeypatch.setenv("LOWMEM_KERNELS", "reference")
    assert told() == ["kernels auto, now reference"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert told()[-1] == f"threads {threads}, now {threads + 1}"
    state = run.folder / "checkpoints" / "step-000003" / "state.json"
    assert "decides_bits" in json.loads(state.read_text())


def test_metrics_beyond_the_checkpoint_are_made_again(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    """As after a kill -9: newer lines than the checkpoint knows, the last one cut."""
    config = ready(tiny_config(checkpoint={"every": 3}))
    whole = Run.create(in_folder(config, "whole"), None)
    train(whole, tiny_corpus, silent)
    cut = Run.create(in_folder(config, "cut"), None)
    with pytest.raises(Stopped):
        train(cut, tiny_corpus, stop_after(2))
    with (cut.folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "loss": 1.0}\n{"update": 4, "lo')
    train(Run.open(cut.folder), tiny_corpus, silent)
    assert told(cut) == told(whole)


def test_a_run_killed_before_its_first_save_starts_again(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = Run.create(ready(tiny_config(checkpoint={"every": 0})), None)
    (run.folder / "metrics.jsonl").write_text('{"update": 0, "loss": 5.0}\n')
    train(Run.open(run.folder), tiny_corpus, silent)
    assert [line["update"] for line in run.metrics() if "loss" in line] == list(range(6))


def test_an_earlier_checkpoint_can_be_continued(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = Run.create(ready(tiny_config(checkpoint={"every": 2, "keep": 3})), None)
    train(run, tiny_corpus, silent)
    before, lines = hashes(run), told(run)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    train(Run.open(run.folder / "checkpoints" / "step-000002"), tiny_corpus, silent)
    assert hashes(run) == before
    assert told(run) == lines


def test_a_crash_after_going_back_to_an_earlier_checkpoint_loses_nothing(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    """The abandoned future must not be taken for the newest state."""
    run = Run.create(ready(tiny_config(checkpoint={"every": 2, "keep": 3})), None)
    train(run, tiny_corpus, silent)
    lines = told(run)

    def crash(event: Event) -> None:
        if isinstance(event, Trained):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Run.open(run.folder / "checkpoints" / "step-000002"), tiny_corpus, crash)
    finished = train(Run.open(run.folder), tiny_corpus, silent)
    assert told(run) == lines
    assert finished.checkpoint.endswith("step-000006")


def test_a_torn_last_event_is_dropped(tiny_config: MakeConfig, tiny_corpus: Corpus) -> None:
    run = finished_run(tiny_config(), tiny_corpus)
    events = run.folder / "events.jsonl"
    events.write_text(events.read_text()[:-10])
    train(Run.open(run.folder), tiny_corpus, silent)
    assert all(json.loads(line) for line in events.read_text().splitlines())


def test_a_checkpoint_can_be_named_from_anywhere(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tiny_config(), tiny_corpus)
    monkeypatch.chdir(run.latest())
    assert Run.open(Path(".")).latest() == run.latest().resolve()
    with pytest.raises(CheckpointError, match="step-000099 does not exist"):
        Run.open(run.folder / "checkpoints" / "step-000099").latest()


def test_a_finished_run_resumes_to_the_same_end(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = Run.create(ready(tiny_config()), None)
    first = train(run, tiny_corpus, silent)
    lines = told(run)
    again = train(Run.open(run.folder), tiny_corpus, silent)
    assert replace(again, seconds=first.seconds) == first
    assert told(run) == lines


def finished_run(config: Config, corpus: Corpus) -> Run:
    run = Run.create(ready(config), None)
    train(run, corpus, silent)
    return run


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["model/model.safetensors", "optimizer/state.safetensors"])
def test_a_flipped_byte_is_found_and_named(
    file: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = finished_run(tiny_config(checkpoint={"every": 3}), tiny_corpus)
    path = run.latest() / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = everything_in(run.folder)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged") as caught:
        train(Run.open(run.folder), tiny_corpus, silent)
    assert "step-000003" in caught.value.fix
    assert everything_in(run.folder) == before


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_an_incomplete_checkpoint_is_refused(
    damage: str, tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = finished_run(tiny_config(), tiny_corpus)
    path = run.latest() / "optimizer" / "state.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"is missing|bytes instead of"):
        train(Run.open(run.folder), tiny_corpus, silent)


def test_a_checkpoint_of_another_model_is_refused(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = finished_run(tiny_config(), tiny_corpus)
    model = run.config.model
    assert not isinstance(model, str)
    other = run.config.model_copy(
        update={"model": model.model_copy(update={"intermediate_size": 96})}
    )
    with pytest.raises(CheckpointError, match=r"down_proj.weight has shape \(32, 88\)"):
        train(replace(run, config=other), tiny_corpus, silent)


def test_a_checkpoint_of_another_method_is_refused(
    tiny_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = finished_run(tiny_config(optimizer={"method": "adamw"}), tiny_corpus)
    galore = ready(tiny_config(optimizer={"method": "galore", "rank": 4}))
    with pytest.raises(CheckpointError, match=r"optimizer state .*exp_avg does not belong"):
        train(replace(run, config=galore), tiny_corpus, silent)


def test_other_tokens_are_refused(tiny_config: MakeConfig, tiny_corpus: Corpus) -> None:
    run = finished_run(tiny_config(), tiny_corpus)
    other = replace(tiny_corpus, train=tiny_corpus.validation)
    with pytest.raises(DataError, match="batch of update 6 is not the one"):
        train(Run.open(run.folder), other, silent)
