"""Saves behind the training: a copy in host memory, then a thread that writes it.

At most one checkpoint is being written; the next save and the end of the run wait for it. What
goes wrong in the thread is raised at the next update.
"""

import time
from collections.abc import Callable
from functools import partial
from threading import Thread
from types import TracebackType

from lowmem.planner.hardware import available_memory
from lowmem.train import checkpoint
from lowmem.train.disk import Patience
from lowmem.train.events import Saved
from lowmem.train.run import Run
from lowmem.train.snapshot import HostCopy, Snapshot

THREAD = "lowmem checkpoint"  # a name that `cli/main.py` knows
_SPARE = 1.25  # of the copy: what must be free so that nobody else is driven to the swap


def host_copy_of(
    wanted: bool, checkpoint_bytes: int, available: int | None = None
) -> tuple[int, str]:
    """(bytes of host memory for a copy, why there is none): what `Saver` will use."""
    if not wanted:
        return 0, "checkpoint.behind = false"
    free = available_memory() if available is None else available
    if free < _SPARE * checkpoint_bytes:
        return 0, "too little host memory is free for a copy"
    return checkpoint_bytes, ""


class Saver:
    """Saves snapshots of a run; a context whose end waits for the last one.

    behind: write in a thread, from a copy; otherwise training waits.
    """

    def __init__(self, run: Run, disk: Patience, *, behind: bool) -> None:
        self._run, self._disk = run, disk
        self._copy = HostCopy() if behind else None
        self._writing: _Writing | None = None
        self._preparing: Thread | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):  # at once: what is half written is no checkpoint
            return
        self._await_copy()
        self.finish()

    def prepare(self, capture: Callable[[], Snapshot]) -> None:
        """Make the memory of the copy behind the training, so that the first save is as quick."""
        if self._copy is not None:
            reserve = partial(self._copy.reserve, capture())
            self._preparing = Thread(target=reserve, name=THREAD, daemon=True)
            self._preparing.start()

    def _await_copy(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def save(self, capture: Callable[[], Snapshot]) -> None:
        """Save what `capture` gives; returns as soon as training may change it."""
        began = time.perf_counter()
        self.finish()
        self._await_copy()
        snapshot = capture()
        if self._copy is not None:
            snapshot = self._copy.of(snapshot)
        self._writing = _Writing(self._run, snapshot)
        if self._copy is None:
            self._writing.run()
        else:
            self._writing.start()
        self._writing.blocked = time.perf_counter() - began
        if self._copy is None:
            self.finish()

    def check(self) -> None:
        """Report a save that has ended, raise what went wrong in it; between updates."""
        if self._writing is not None and not self._writing.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and while the disk has no room for it."""
        if self._writing is None:
            return
        writing, began = self._writing, time.perf_counter()
        if writing.ident is not None:
            writing.join()
        self._writing = None
        error = writing.error
        if isinstance(error, OSError):
            what = f"the checkpoint of update {writing.snapshot.at.update}"
            self._disk.require_full(what, error)
            self._disk.until_done(what, writing.again)
        elif error is not None:
            raise error
        writing.blocked += time.perf_counter() - began
        self._disk.record(writing.saved())


class _Writing(Thread):
    """One checkpoint on its way to the disk. A daemon, so that a second Ctrl-C need not wait."""

    def __init__(self, run: Run, snapshot: Snapshot) -> None:
        super().__init__(name=THREAD, daemon=True)
        self.snapshot, self._run = snapshot, run
        self.error: Exception | None = None
        self.blocked = 0.0
        self._seconds = 0.0
        self._path = ""

    def run(self) -> None:
        try:
            self.again()
        except Exception as error:  # raised where somebody waits for it, in `Saver.finish`
            self.error = error

    def again(self) -> None:
        began = time.perf_counter()
        self._path = str(checkpoint.write(self._run, self.snapshot))
        self._seconds = time.perf_counter() - began

    def saved(self) -> Saved:
        return Saved(
            self.snapshot.at.update, self._path, self.snapshot.bytes, self._seconds, self.blocked
        )
