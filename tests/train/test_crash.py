"""A save that fails or dies at any system call, and a checkpoint with any bit flipped."""

import builtins
import errno
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.errors import CheckpointError
from lowmem.tensorfile import sha256_of
from lowmem.train.checkpoint import tidy, verify, write
from lowmem.train.run import Run
from lowmem.train.snapshot import Position, Snapshot, TensorFile

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open", "scandir")


class Killed(BaseException):
    """The process is dead: no handler of ours sees it, and nothing that follows has an effect."""


class Faults:
    """Counts system calls of a save and lets the one with number `at` fail.

    error: an errno, or None for a kill, which a write does not survive as a whole either.
    """

    def __init__(self, at: int = 0, error: int | None = None) -> None:
        self.at, self.error, self.count, self.dead = at, error, 0, False
        self.names: list[str] = []

    def step(self, name: str) -> None:
        if self.dead:
            raise Killed
        self.count += 1
        self.names.append(name)
        if self.count != self.at:
            return
        if self.error is None:
            self.dead = True
            raise Killed
        raise OSError(self.error, os.strerror(self.error))

    @contextmanager
    def injected(self) -> Iterator[None]:
        def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                self.step(name)
                return None if name == "fsync" else real(*arguments, **options)

            return call

        def opening(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if "r" in mode:
                return real_open(file, mode, *arguments, **options)
            self.step("create")
            return Watched(real_open(file, mode, *arguments, **options), self)

        real_open = io.open
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", opening)
            patch.setattr(builtins, "open", opening)
            for name in CALLS:
                patch.setattr(os, name, failing(name, getattr(os, name)))
            yield


class Watched:
    """A file whose writes are counted; one that fails has written half."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, content: Any) -> int:
        try:
            self._faults.step("write")
        except BaseException:
            self._file.write(memoryview(content)[: len(content) // 2])
            raise
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@pytest.fixture
def run(ready_config: Callable[..., Config]) -> Run:
    return Run.create(ready_config(checkpoint={"keep": 2}), None)


def snapshot(update: int, mark: float = 0.0) -> Snapshot:
    """A small one, different for every update and mark."""
    tensors = [("a", torch.full((4, 3), update + mark)), ("b", torch.ones(5).bfloat16())]
    return Snapshot(
        Position(update, 10 * update),
        {"state.json": b'{"update": %d}' % update, "model/config.json": b"{}"},
        {
            "model/model.safetensors": TensorFile(tensors, {"format": "pt"}),
            "optimizer/state.safetensors": TensorFile(tensors),
        },
    )


def weights_of(checkpoint: Path) -> str:
    return sha256_of(checkpoint / "model" / "model.safetensors")


SCENES = {  # saved before; what is saved while a call fails
    "a new one": ((2, 4), snapshot(6)),
    "the first": ((), snapshot(6)),
    "the same update again": ((2, 4), snapshot(4, mark=0.5)),
    "the only one again": ((4,), snapshot(4, mark=0.5)),
}


def prepared(run: Run, before: tuple[int, ...]) -> None:
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    (run.folder / "latest").unlink(missing_ok=True)
    for update in before:
        write(run, snapshot(update))


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(errno.ENOSPC, id="ENOSPC"),
        pytest.param(errno.EIO, id="EIO", marks=pytest.mark.slow),  # the path of ENOSPC
        pytest.param(None, id="kill"),
    ],
)
def test_a_save_that_fails_at_any_call_leaves_a_checkpoint(
    error: int | None, scene: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, saving = SCENES[scene]
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # there is no power cut in this test
    prepared(run, before)
    old = weights_of(run.latest()) if before else ""
    counted = Faults()
    with counted.injected():
        write(run, saving)
    assert {"create", "write", "fsync", "rename", "replace", "mkdir"} <= set(counted.names)
    new = weights_of(run.latest())
    for at in range(1, counted.count + 1):
        prepared(run, before)
        faults = Faults(at, error)
        failed = False
        with faults.injected():
            try:
                write(run, saving)
            except (OSError, Killed):
                failed = True
        where = f"call {at} of {counted.count}, {faults.names[at - 1]}"
        if not failed:  # a folder that is there already need not be made
            assert faults.names[at - 1] == "mkdir", where
            assert weights_of(run.latest()) == new, where
        if before:  # nothing is tidied yet: as `eval` finds the run after a crash
            verify(run.latest())
            assert weights_of(run.latest()) in (old, new), where
        for path in run.complete():  # what has its name is whole
            verify(path)
        tidy(run)
        if before:
            verify(run.latest())
        left = write(run, saving)
        assert run.latest() == left, where
        assert weights_of(left) == new, where
        assert not list(run.checkpoints.glob(".tmp-*")), where


def flips(checkpoint: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit), spread evenly over the bytes of all files, with every file hit."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    places = random.Random(seed)
    each = -(-count // len(files))
    for path in files:
        size = path.stat().st_size
        chosen = range(size) if size <= each else sorted(places.sample(range(size), each))
        yield from ((path, byte, places.randrange(8)) for byte in chosen)


def complaint(checkpoint: Path) -> str | None:
    try:
        verify(checkpoint)
    except CheckpointError as error:
        return error.what
    return None


def flipped_everywhere(checkpoint: Path, count: int) -> tuple[int, int]:
    """(flips that were detected and named, flips that change nothing); AssertionError: others."""
    detected = irrelevant = 0
    for path, byte, bit in flips(checkpoint, count, seed=0):
        whole = path.read_bytes()
        content = bytearray(whole)
        content[byte] ^= 1 << bit
        path.write_bytes(content)
        said = complaint(checkpoint)
        if said is None:
            same = path.name == "manifest.json" and json.loads(whole) == json.loads(content)
            assert same, f"{path}: byte {byte}, bit {bit} goes unnoticed"
            irrelevant += 1
        else:
            assert path.name in said, f"{path}: byte {byte}, bit {bit}: {said}"
            detected += 1
        path.write_bytes(whole)
    verify(checkpoint)
    return detected, irrelevant


@pytest.mark.parametrize("count", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_detected_and_named(
    count: int, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    large = snapshot(2)
    more = [*large.tensors["model/model.safetensors"].tensors, ("c", torch.randn(3000))]
    large.tensors["model/model.safetensors"] = TensorFile(more, {"format": "pt"})
    large.files["model/tokenizer.json"] = json.dumps({str(n): n for n in range(500)}).encode()
    detected, irrelevant = flipped_everywhere(write(run, large), count)
    with capsys.disabled():
        print(f" [{detected} flips detected, {irrelevant} irrelevant]", end="")
    assert detected + irrelevant >= count / 2
    assert irrelevant <= 0.01 * detected
