"""A run is read back as it was written, however it ended."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowmem.analysis.history import History, read_all
from lowmem.errors import CheckpointError, LowMemError
from lowmem.train.events import Started
from lowmem.train.lock import LOCK, held
from lowmem.train.run import EVENTS, METRICS
from tests.analysis.conftest import Make, append, trained


def test_a_run_is_read_back(make_run: Make) -> None:
    run = History.read(make_run("a", final=3.5, peak=1234))
    assert [each.loss for each in run.trained] == [6.0, 5.0, 4.5, 4.2]
    assert run.perplexity == pytest.approx(math.exp(3.5))
    assert (run.seconds, run.elapsed()) == (2.0, [0.5, 1.0, 1.5, 2.0])
    assert run.peak is not None
    assert (run.peak.what, run.peak.bytes) == ("tensors", 1234)
    assert (run.done, run.updates, run.status) == (4, 4, "finished")
    assert run.tokens_at(2) == 3 * 128
    assert run.corpus == "c0ffee" * 10
    assert run.warnings == []


def test_on_cuda_the_peak_is_that_of_the_whole_run(make_run: Make) -> None:
    run = History.read(make_run("a", train={"device": "cuda"}))
    assert run.peak is not None
    assert (run.peak.what, run.peak.bytes) == ("allocated", 10**9 + 3)


def test_a_line_that_is_being_written_is_not_read_and_no_damage(make_run: Make) -> None:
    folder = make_run("a")
    with (folder / METRICS).open("a") as file:
        file.write('{"update": 4, "loss": 3')
    run = History.read(folder)
    assert run.done == 4
    assert run.warnings == []


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "[1]",
        "\x00\xff",
        '{"update": 4}',
        '{"update": 4, "loss": "much", "lr": 1}',
        '{"update": null, "eval_loss": 3.0, "eval_tokens": 10, "seconds": 1.0}',
        "[" * 100_000,
    ],
    ids=["no json", "a list", "bytes", "no kind", "a word", "null", "deep"],
)
def test_a_damaged_line_is_left_out_and_counted(make_run: Make, line: str) -> None:
    folder = make_run("a")
    lines = (folder / METRICS).read_text().splitlines()
    lines[2:2] = [line, line]
    (folder / METRICS).write_text("\n".join(lines) + "\n", encoding="latin-1")
    run = History.read(folder)
    assert [each.loss for each in run.trained] == [6.0, 5.0, 4.5, 4.2]
    (warning,) = run.warnings
    assert warning.startswith("metrics.jsonl: 2 lines are no record")
    assert warning.endswith("line 3")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_damaged_files_beside_the_metrics_are_told(make_run: Make, text: str) -> None:
    folder = make_run("a")
    for name in ("env.json", "verdict.json", "plan.json"):
        (folder / name).write_text(text)
    run = History.read(folder)
    assert (run.environment, run.verdict, run.plan) == ({}, None, None)
    named = sorted(warning.split()[0] for warning in run.warnings)
    assert named == ["env.json", "verdict.json"]


def test_a_run_of_a_living_process_is_running(make_run: Make) -> None:
    folder = make_run("a")
    with held(folder):
        assert History.read(folder).status == "running"
    assert History.read(folder).status == "finished"


@pytest.mark.parametrize("holder", [{"pid": 2**22 + 1}, {"host": "elsewhere"}, {"pid": -1}, []])
def test_who_does_not_live_here_runs_nothing(make_run: Make, holder: Any) -> None:
    import os
    import socket

    folder = make_run("a")
    if isinstance(holder, dict):
        holder = {"pid": os.getpid(), "host": socket.gethostname()} | holder
    (folder / LOCK).write_text(json.dumps(holder))
    assert History.read(folder).process is None


def test_a_finished_run_that_went_on_is_unfinished(make_run: Make) -> None:
    folder = make_run("a")
    append(folder / EVENTS, [Started(4, 8, 128, "a")])
    append(folder / METRICS, [trained(4, 4.0)])
    assert History.read(folder).status == "unfinished"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"is no run|does not exist"):
            History.read(path)


def test_a_configuration_that_is_not_settled_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model = "llama-60m"\n')
    with pytest.raises(CheckpointError, match="is no run") as raised:
        History.read(tmp_path)
    assert "train.updates" in raised.value.why


def test_a_damaged_configuration_is_named(make_run: Make) -> None:
    folder = make_run("a")
    (folder / "config.toml").write_text("[train\n")
    with pytest.raises(LowMemError) as raised:
        History.read(folder)
    assert "config.toml" in raised.value.what + raised.value.why


def test_a_run_without_updates_is_named(make_run: Make) -> None:
    folder = make_run("a", losses=(), final=None, ended=False, corpus=None)
    with pytest.raises(CheckpointError, match="has no updates"):
        read_all([folder])


def test_a_run_given_twice_is_read_once(make_run: Make) -> None:
    folder = make_run("a")
    assert len(read_all([folder, folder, folder / "checkpoints" / "step-000004"])) == 1
