"""The run folder: made once, never written over, and readable after a crash."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.presets import read_preset
from lowmem.config.schema import Config, ModelConfig
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError, ConfigError
from lowmem.train.events import Evaluated, Measured, Saved, Stopping, Trained
from lowmem.train.run import Run, environment

MakeConfig = Callable[..., Config]


def unnamed(config: Config, **fields: Any) -> Config:
    """`config` without a name, so that the run finds one."""
    run = config.run.model_copy(update={"name": None})
    return config.model_copy(update={"run": run, **fields})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def trained(update: int) -> Trained:
    return Trained(update, 5.0 - update, 0.01, 256 * (update + 1), 0.5, "gradient", 0.1, 10.0, 1000)


def test_names_count_up_from_the_model_and_the_method(ready_config: MakeConfig) -> None:
    config = unnamed(ready_config(), model="llama-9m")
    names = [Run.create(config, None).folder.name for _ in range(3)]
    assert names == ["llama-9m-galore-1", "llama-9m-galore-2", "llama-9m-galore-3"]


def test_a_name_that_became_free_is_taken_first(ready_config: MakeConfig) -> None:
    config = unnamed(ready_config())  # an inline model has no name of its own
    (Path(config.run.out) / "model-galore-2").mkdir(parents=True)
    names = [Run.create(config, None).folder.name for _ in range(2)]
    assert names == ["model-galore-1", "model-galore-3"]


def test_a_run_that_exists_is_not_touched(ready_config: MakeConfig) -> None:
    run = Run.create(ready_config(), None)
    run.record(trained(0))
    before = contents(run.folder)
    with pytest.raises(ConfigError, match=f"the run folder {run.folder} exists") as caught:
        Run.create(ready_config(train={"seed": 9}), {"fits": True})
    assert f"`lowmem resume {run.folder}` continues it" in caught.value.fix
    assert contents(run.folder) == before


def test_an_out_that_is_no_folder_is_told(ready_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    config = ready_config(run={"out": str(tmp_path / "file"), "name": "a"})
    with pytest.raises(ConfigError, match="cannot be made") as caught:
        Run.create(config, None)
    assert "--out" in caught.value.fix
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("plan", [None, {"fits": True, "peak_bytes": 12}])
def test_a_new_run_holds_what_was_asked_and_planned(
    plan: dict[str, Any] | None, ready_config: MakeConfig
) -> None:
    run = Run.create(ready_config(), plan)
    assert (run.folder / "checkpoints").is_dir()
    if plan is None:
        assert not (run.folder / "plan.json").exists()
    else:
        assert json.loads((run.folder / "plan.json").read_text()) == plan
    assert json.loads((run.folder / "env.json").read_text())["torch"] == environment()["torch"]
    assert Run.open(run.folder) == run
    assert list(run.metrics()) == []


def test_its_configuration_means_the_same_anywhere(
    ready_config: MakeConfig,
    tiny_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A preset becomes its numbers, relative paths absolute; a name such as c4 stays."""
    monkeypatch.chdir(tiny_corpus.folder.parent)
    config = ready_config(data={"source": tiny_corpus.folder.name, "seq_len": 32})
    config = unnamed(config, model="llama-9m")
    run = Run.create(config, None)
    monkeypatch.chdir(tmp_path)
    opened = Run.open(run.folder).config
    assert opened.model == read_preset("llama-9m")
    assert isinstance(opened.model, ModelConfig)
    assert Path(opened.data.source).resolve() == tiny_corpus.folder.resolve()
    assert opened.run.name == run.folder.name
    named = Run.create(unnamed(ready_config(data={"source": "c4", "seq_len": 32})), None)
    assert Run.open(named.folder).config.data.source == "c4"


def test_opening_ignores_the_environment(
    ready_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(ready_config(), None)
    monkeypatch.setenv("LOWMEM_RANK", "99")
    assert Run.open(run.folder).config == run.config


def test_a_checkpoint_opens_its_run_and_is_where_it_starts(ready_config: MakeConfig) -> None:
    run = Run.create(ready_config(), None)
    for name in ("step-000002", "step-000004"):
        (run.folder / "checkpoints" / name).mkdir()
    (run.folder / "latest").write_text("step-000004\n")
    assert run.latest() == run.folder / "checkpoints" / "step-000004"
    opened = Run.open(run.folder / "checkpoints" / "step-000002")
    assert opened.folder == run.folder
    assert opened.latest() == run.folder / "checkpoints" / "step-000002"


@pytest.mark.parametrize(
    ("made", "message"), [(False, "nothing does not exist"), (True, "nothing is no run")]
)
def test_what_is_no_run_is_told(made: bool, message: str, tmp_path: Path) -> None:
    if made:
        (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=message):
        Run.open(tmp_path / "nothing")


@pytest.mark.parametrize("pointer", [None, "", "step-000009\n"])
def test_a_run_without_a_complete_checkpoint_says_so(
    pointer: str | None, ready_config: MakeConfig
) -> None:
    run = Run.create(ready_config(), None)
    if pointer is not None:
        (run.folder / "latest").write_text(pointer)
    with pytest.raises(CheckpointError, match="has no complete checkpoint") as caught:
        run.latest()
    assert str(run.folder / "config.toml") in caught.value.fix


def test_metrics_and_events_go_to_their_files(ready_config: MakeConfig) -> None:
    run = Run.create(ready_config(), None)
    for metric in (trained(0), Evaluated(0, 4.0, 10, 0.1)):
        run.record(metric)
    for event in (Saved(1, "x", 1, 0.1, 0.0), Stopping("SIGINT"), Measured("tensors", 1, 2)):
        run.record(event)
    assert [line["update"] for line in run.metrics()] == [0, 0]
    lines = (run.folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["saved", "stopping", "measured"]


@pytest.mark.parametrize("cut", [1, 20, -3])
def test_a_line_cut_by_a_crash_is_left_out(cut: int, ready_config: MakeConfig) -> None:
    run = Run.create(ready_config(), None)
    for update in range(3):
        run.record(trained(update))
    path = run.folder / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:2]) + whole[2][:cut])
    assert [line["update"] for line in run.metrics()] == [0, 1]


@pytest.mark.parametrize(("updates", "left"), [(0, []), (2, [0, 1]), (9, [0, 1, 2])])
def test_updates_that_a_checkpoint_does_not_know_are_forgotten(
    updates: int, left: list[int], ready_config: MakeConfig
) -> None:
    run = Run.create(ready_config(), None)
    for update in range(3):
        run.record(trained(update))
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "lo')
    run.forget_after(updates)
    assert [line["update"] for line in run.metrics()] == left
    run.record(trained(7))  # and the next line is whole
    assert [line["update"] for line in run.metrics()] == [*left, 7]
    assert not list(run.folder.glob("*.tmp"))
