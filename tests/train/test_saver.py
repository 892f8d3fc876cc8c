"""Saving behind the training: the same bytes, no error lost, a full disk only a pause."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import CheckpointConfig, Config
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError, Stopped
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.tensorfile import read_tensors, sha256_of
from lowmem.train import checkpoint, disk, loop, saver
from lowmem.train.build import declared_bytes
from lowmem.train.disk import Patience, most_at_once, require_room
from lowmem.train.events import Continued, Event, Paused, Saved, Storage, Trained
from lowmem.train.guard import StopRequest
from lowmem.train.lock import held
from lowmem.train.loop import train
from lowmem.train.retention import kept_at_most, superseded
from lowmem.train.run import Run
from lowmem.train.saver import Saver
from lowmem.train.snapshot import HostCopy, Position, Snapshot, TensorFile

MakeConfig = Callable[..., Config]


def snapshot(update: int, value: float) -> Snapshot:
    tensor = torch.full((3, 4), value)
    return Snapshot(
        Position(update),
        {"state.json": b"{}", "model/config.json": b"{}"},
        {
            "model/model.safetensors": TensorFile([("a", tensor)], {"format": "pt"}),
            "optimizer/state.safetensors": TensorFile([("b", tensor.T)]),
        },
    )


@pytest.fixture
def run(ready_config: MakeConfig) -> Run:
    return Run.create(ready_config(), None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RETRY_SECONDS", 0.0)


def patience(run: Run, events: list[Event]) -> Patience:
    return Patience(run, events.append, StopRequest(run.folder))


def value_of(path: Path) -> float:
    return dict(read_tensors(path / "model" / "model.safetensors"))["a"][0, 0].item()


def test_training_may_go_on_while_a_checkpoint_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits until the tensor has changed; what is written is from before."""
    changed = threading.Event()
    write = checkpoint.write

    def late(*arguments: Any) -> Path:
        assert changed.wait(10)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", late)
    events: list[Event] = []
    live = snapshot(2, 1.0)
    with Saver(run, patience(run, events), behind=True) as saving:
        saving.save(lambda: live)
        live.tensors["model/model.safetensors"].tensors[0][1].fill_(7.0)
        saving.check()
        assert events == []
        changed.set()
    assert value_of(run.latest()) == 1.0
    (saved,) = events
    assert isinstance(saved, Saved)
    assert (saved.update, saved.path) == (2, str(run.latest()))


@pytest.mark.parametrize("behind", [True, False])
def test_every_save_is_whole_and_reported_once(behind: bool, run: Run) -> None:
    events: list[Event] = []
    with Saver(run, patience(run, events), behind=behind) as saving:
        for update in (1, 2, 3):
            saving.save(lambda update=update: snapshot(update, float(update)))  # type: ignore[misc]
    assert [e.update for e in events if isinstance(e, Saved)] == [1, 2, 3]
    assert [value_of(path) for path in run.complete()] == [2.0, 3.0]  # keep = 2
    blocked = [e.blocked <= e.seconds + 1.0 for e in events if isinstance(e, Saved)]
    assert all(blocked)


def test_the_copy_uses_its_memory_again_and_follows_changed_shapes() -> None:
    copy = HostCopy()
    first = copy.of(snapshot(1, 1.0)).tensors["model/model.safetensors"].tensors[0][1]
    second = copy.of(snapshot(2, 2.0)).tensors["model/model.safetensors"].tensors[0][1]
    assert first.data_ptr() == second.data_ptr()
    other = Snapshot(Position(), {}, {"x": TensorFile([("a", torch.ones(9))])})
    (copied,) = copy.of(other).tensors["x"].tensors
    assert torch.equal(copied[1], torch.ones(9))


def test_the_memory_that_was_reserved_is_the_one_that_is_used(run: Run) -> None:
    copy = HostCopy()
    copy.reserve(snapshot(1, 1.0))
    reserved = {tensor.data_ptr() for tensor in copy._buffers.values()}
    copied = copy.of(snapshot(2, 2.0))
    used = {tensor.data_ptr() for file in copied.tensors.values() for _, tensor in file.tensors}
    assert used == reserved
    events: list[Event] = []
    with Saver(run, patience(run, events), behind=True) as saving:
        saving.prepare(lambda: snapshot(0, 0.0))
        saving.save(lambda: snapshot(3, 3.0))
    assert value_of(run.latest()) == 3.0


def test_the_end_of_a_run_waits_for_the_memory_that_is_being_prepared(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by killing runs: a thread that Python ends inside torch aborts the process."""
    ready = threading.Event()

    def late(copy: HostCopy, snapshot: Snapshot) -> None:
        time.sleep(0.1)
        ready.set()

    monkeypatch.setattr(HostCopy, "reserve", late)
    with Saver(run, patience(run, []), behind=True) as saving:
        saving.prepare(lambda: snapshot(1, 1.0))
    assert ready.is_set()


_INTERRUPTED = """
import sys, threading
import torch
from lowmem.cli import main
from lowmem.train.saver import THREAD

def work():
    while True:
        torch.ones(1000, 1000).mul_(2).sum().item()

def run(arguments):
    threading.Thread(target=work, name=THREAD, daemon=True).start()
    print("begun")
    return 130

main.run = run
main.main()
"""


def test_a_second_ctrl_c_leaves_without_waiting_for_a_save() -> None:
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"begun\n", b"")


@pytest.mark.parametrize("behind", [True, False])
def test_an_error_of_the_writer_is_raised_at_the_next_look(
    behind: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Path:
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr(checkpoint, "write", broken)

    def save_and_look() -> None:
        with Saver(run, patience(run, []), behind=behind) as saving:
            saving.save(lambda: snapshot(1, 1.0))

    with pytest.raises(CheckpointError, match=r"update 1 cannot be written .*: the disk is dying"):
        save_and_look()


@pytest.mark.parametrize("behind", [True, False])
def test_a_full_disk_pauses_the_save_until_there_is_room(
    behind: bool, run: Run, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, tries = checkpoint.write, []

    def full_at_first(*arguments: Any) -> Path:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", full_at_first)
    events: list[Event] = []
    with Saver(run, patience(run, events), behind=behind) as saving:
        saving.save(lambda: snapshot(1, 1.0))
    assert [type(event) for event in events] == [Paused, Continued, Saved]
    assert value_of(run.latest()) == 1.0
    recorded = [json.loads(line)["event"] for line in (run.folder / "events.jsonl").open()]
    assert recorded == ["paused", "continued", "saved"]


def test_a_stop_while_the_disk_is_full_ends_resumable(run: Run) -> None:
    def full() -> None:
        (run.folder / "STOP").touch()
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(Stopped, match="STOP while the disk was full") as caught:
        patience(run, []).until_done("a test", full)
    assert caught.value.exit_code == 75


def test_a_line_that_did_not_fit_is_written_whole_later(
    run: Run, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is nearly full takes half a line; the next try must not follow on that half."""
    opened, tries = Path.open, []

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: memoryview) -> int:
            tries.append(1)
            if len(tries) == 1:
                return self.file.write(content[:5])
            if len(tries) < 4:
                raise OSError(errno.ENOSPC, "no space left on device")
            return self.file.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    def half(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = opened(path, mode, *arguments, **options)
        return Half(file) if mode == "ab" else file

    monkeypatch.setattr(Path, "open", half)
    patience(run, []).record(Trained(0, 5.0, 0.1, 256, 0.5, "gradient", 0.1, 10.0, 1000))
    assert [line["update"] for line in run.metrics()] == [0]


def test_a_whole_run_waits_for_room_and_ends_as_ever(
    ready_config: MakeConfig, tiny_corpus: Corpus, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync reports a full disk, in the thread that writes and in what is tried again."""
    smooth = Run.create(ready_config(checkpoint={"every": 2}), None)
    train(smooth, tiny_corpus, lambda event: None)
    config = ready_config(checkpoint={"every": 2}, run={"out": str(smooth.folder.parent)})
    real, calls = os.fsync, []

    def sometimes(handle: int) -> None:
        calls.append(1)
        if len(calls) in (3, 9, 40):
            raise OSError(errno.ENOSPC, "no space left on device")
        real(handle)

    run = Run.create(config, None)
    events: list[Event] = []
    monkeypatch.setattr(os, "fsync", sometimes)
    train(run, tiny_corpus, events.append)
    assert any(isinstance(event, Paused) for event in events)
    assert [e.update for e in events if isinstance(e, Saved)] == [2, 4, 6]
    for name in ("model/model.safetensors", "optimizer/state.safetensors"):
        assert sha256_of(run.latest() / name) == sha256_of(smooth.latest() / name)


def test_too_little_host_memory_writes_while_training_waits_and_says_so(
    ready_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "available_memory", lambda: 1000)
    events: list[Event] = []
    train(Run.create(ready_config(), None), tiny_corpus, events.append)
    (storage,) = [event for event in events if isinstance(event, Storage)]
    assert storage.host_copy == 0
    assert "too little host memory" in storage.why


def test_the_declared_size_is_that_of_the_tensors_on_disk(
    ready_config: MakeConfig, tiny_corpus: Corpus
) -> None:
    run = Run.create(ready_config(), None)
    train(run, tiny_corpus, lambda event: None)
    tensors = [t for path in run.latest().rglob("*.safetensors") for _, t in read_tensors(path)]
    assert declared_bytes(run.config) == sum(tensor.nbytes for tensor in tensors)


SAVED: list[dict[str, Any]] = [
    {"optimizer": {"method": "galore", "rank": 8, "states": "8bit"}},
    {"optimizer": {"method": "frugal"}, "train": {"weights": "bf16"}},
    {"optimizer": {"method": "apollo_mini"}, "train": {"ends": "int8"}},
    {"model": {"tie_word_embeddings": True}, "optimizer": {"method": "adamw"}},
]


@pytest.mark.parametrize("changes", SAVED)
def test_a_plan_says_how_large_a_checkpoint_will_be(
    changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    sections = dict(changes)
    tied = sections.pop("model", {})
    config = tiny_config(**sections)
    assert not isinstance(config.model, str)
    model = config.model.model_copy(update=tied)
    config = config.model_copy(update={"model": model})
    plan = make_plan(config, find_card("8GB", "cpu"), [])
    assert plan.checkpoint_bytes == declared_bytes(plan.config)


def test_a_run_is_refused_before_it_starts_without_room(
    ready_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ready_config(checkpoint={"keep": 3, "every": 2})
    assert most_at_once(config) == 4
    free = [3999]
    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]})
    )
    with pytest.raises(CheckpointError, match="no room for checkpoints") as caught:
        require_room(config, tmp_path / "not" / "yet", 1000, 0)
    assert "4 of 1000 B" in caught.value.why
    assert require_room(config, tmp_path, 1000, 1) == 3999  # what is there counts
    free[0] = 4000
    assert require_room(config, tmp_path, 1000, 0) == 4000


def simulated(config: CheckpointConfig, every: int, updates: int, reach: int) -> list[list[int]]:
    kept: list[int] = []
    history = []
    for newest in range(every, updates + 1, every):
        gone = superseded(kept, newest, config, best=None, reach=reach)
        kept = [*(update for update in kept if update not in gone), newest]
        history.append(kept)
    return history


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("every", [1, 7, 50, 176, 1000])
def test_a_rollback_always_finds_a_checkpoint_that_is_old_enough(keep: int, every: int) -> None:
    reach = 176
    config = CheckpointConfig(keep=keep)
    history = simulated(config, every, 3000, reach)
    for kept in history:
        newest = kept[-1]
        assert kept[-keep:] == list(range(every, newest + 1, every))[-keep:]
        if newest >= 2 * reach + every:
            old = [update for update in kept if update <= newest - reach]
            assert old, kept
            assert newest - old[-1] <= 3 * reach + every  # and one that is not much older
    assert max(map(len, history)) <= kept_at_most(config, every, 3000, reach) <= keep + 3


def test_the_best_and_those_for_good_stay() -> None:
    config = CheckpointConfig(keep=2, keep_every=10)
    older = [2, 4, 10, 12, 14, 20, 22]
    assert superseded(older, 24, config, best=4, reach=0) == [2, 12, 14]
    assert superseded(older, 24, config, best=None, reach=0) == [2, 4, 12, 14]
    assert superseded([], 24, config, best=None, reach=0) == []


def test_the_best_evaluation_is_saved_and_kept(
    ready_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 3.0, 4.0, 3.5, 6.0, 7.0])
    evaluated = loop._evaluated

    def told(*arguments: Any) -> Any:
        return replace(evaluated(*arguments), eval_loss=next(losses))

    monkeypatch.setattr(loop, "_evaluated", told)
    config = ready_config(
        evaluate={"every": 1, "tokens": 100},
        checkpoint={"every": 0, "keep": 1, "keep_best": True, "keep_every": 3},
    )
    run = Run.create(config, None)
    train(run, tiny_corpus, lambda event: None)
    assert [path.name for path in run.complete()] == ["step-000002", "step-000003", "step-000006"]


def test_two_processes_on_one_run_are_refused(run: Run) -> None:
    code = (
        "import sys; from pathlib import Path; from lowmem.train.lock import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {other.pid} on "):
            held(run.folder).__enter__()
        other.kill()
        other.wait()
    with held(run.folder):  # the dead hold nothing
        pass
    with held(run.folder):
        pass


def test_save_pause_and_stop_files_are_obeyed(
    ready_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "PAUSE_SECONDS", 0.0)
    run = Run.create(ready_config(checkpoint={"every": 0}), None)
    events: list[Event] = []

    def touch(event: Event) -> None:
        events.append(event)
        if isinstance(event, Trained) and event.update == 1:
            (run.folder / "SAVE").touch()
        if isinstance(event, Trained) and event.update == 2:
            (run.folder / "PAUSE").touch()
        if isinstance(event, Paused):
            (run.folder / "PAUSE").unlink()
        if isinstance(event, Trained) and event.update == 3:
            (run.folder / "STOP").touch()

    with pytest.raises(Stopped, match="stopped by STOP after 4 updates"):
        train(run, tiny_corpus, touch)
    assert [path.name for path in run.complete()] == ["step-000002", "step-000004"]
    kinds = [type(event) for event in events]
    assert kinds.index(Continued) == kinds.index(Paused) + 1
    assert not any((run.folder / name).exists() for name in ("SAVE", "STOP", "PAUSE"))
    train(Run.open(run.folder), tiny_corpus, lambda event: None)
