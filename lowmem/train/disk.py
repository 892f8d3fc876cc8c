"""A full disk pauses a run instead of ending it; and how much room a run needs before it starts."""

import errno
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from lowmem.config.schema import Config, settled
from lowmem.errors import CheckpointError, Stopped, command_line
from lowmem.train.events import Continued, Event, Paused, Report
from lowmem.train.guard import StopRequest
from lowmem.train.retention import kept_at_most
from lowmem.train.run import Run
from lowmem.units import format_bytes

RETRY_SECONDS = 20.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Patience:
    """Repeats what a full disk prevented until there is room, or the run is asked to stop."""

    def __init__(self, run: Run, report: Report, stop: StopRequest) -> None:
        self._run, self._report, self._stop = run, report, stop

    def record(self, event: Event) -> None:
        """Write an event to the run's files, then report it."""
        self.until_done("an event", lambda: self._run.record(event))
        self._report(event)

    def until_done(self, what: str, action: Callable[[], T]) -> T:
        """action(), repeated while the disk is full. Stopped when that is asked meanwhile;
        CheckpointError for what waiting does not mend."""
        try:
            return action()
        except OSError as error:
            self.require_full(what, error)
        began = time.monotonic()
        paused = Paused(f"the disk is full: {what} cannot be written to {self._run.folder}")
        self._report(paused)
        while True:
            if self._stop.wait(RETRY_SECONDS):
                raise self._unsaved()
            try:
                done = action()
                break
            except OSError as error:
                self.require_full(what, error)
        continued = Continued(time.monotonic() - began)
        for event in (paused, continued):
            self.until_done("an event", partial(self._run.record, event))
        self._report(continued)
        return done

    def require_full(self, what: str, error: OSError) -> None:
        """CheckpointError unless `error` is for want of room: read-only, a limit of file sizes."""
        if error.errno in _FULL:
            return
        raise CheckpointError(
            f"{what} cannot be written to {self._run.folder}: {error.strerror or error}",
            "the run goes on from its newest complete checkpoint",
            f"put that right, then: {command_line('resume', self._run.folder)}",
        ) from error

    def _unsaved(self) -> Stopped:
        return Stopped(
            f"stopped by {self._stop.signal} while the disk was full; what was not saved is lost",
            "the run goes on from its newest complete checkpoint",
            f"make room on its disk, then: {command_line('resume', self._run.folder)}",
        )


def require_room(config: Config, folder: Path, checkpoint_bytes: int, existing: int) -> int:
    """The free bytes of the disk of `folder`; CheckpointError if checkpoints do not fit there.

    Needed is what is kept and the one that is being written; existing: bytes of those there are.
    """
    count = most_at_once(config)
    free = shutil.disk_usage(_nearest(folder)).free
    need = count * checkpoint_bytes
    if free + existing < need:
        raise CheckpointError(
            f"no room for checkpoints in {folder}: {format_bytes(need)} needed,"
            f" {format_bytes(free + existing)} free",
            f"{count} of {format_bytes(checkpoint_bytes)}: {count - 1} are kept while one is"
            " written",
            "make room, or --out on another disk, or --keep 1",
        )
    return free


def most_at_once(config: Config) -> int:
    """Checkpoints that stand on the disk together, the one being written included."""
    every, updates = settled(config.checkpoint.every), settled(config.train.updates)
    return kept_at_most(config.checkpoint, every, updates, config.guard.reach) + 1


def _nearest(folder: Path) -> Path:
    """The folder, or what stands of its path."""
    whole = folder.absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())
