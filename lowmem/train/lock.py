"""One process per run folder: a lock that the system drops when its holder dies."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from lowmem.errors import CheckpointError

LOCK = "lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder against other processes. CheckpointError names the process that has it.

    A lock file that a killed process left behind blocks nobody. Windows has no such lock: there
    two processes on one run are not noticed.
    """
    if sys.platform == "win32":
        yield
        return
    with _opened(folder) as file:
        _take(file, folder)
        with suppress(OSError):  # a full disk: then the holder has no name
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def holder_of(folder: Path) -> int | None:
    """The process of this machine that holds the run folder, as far as one can see without locking.

    To lock, even for a moment, could make a trainer fail that is just starting.
    """
    if sys.platform == "win32":  # nothing is held there, and signal 0 is no question
        return None
    try:
        holder = json.loads((folder / LOCK).read_bytes())
        process = holder["pid"] if holder["host"] == socket.gethostname() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(process, int) or process <= 0:
        return None
    try:
        os.kill(process, 0)
    except PermissionError:
        return process  # of another user
    except (OSError, OverflowError):
        return None
    return process


def _opened(folder: Path) -> FileIO:
    try:
        return (folder / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}",
            "a run writes its metrics and checkpoints there",
            "change the folder's owner or permissions",
        ) from None


def _take(file: FileIO, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"{folder} is in use by {_holder(file)}",
            "two processes on one run would write over each other's checkpoints",
            f"wait for it, or end it: touch {folder / 'STOP'}",
        ) from None


def _holder(file: FileIO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it is just writing its name
        return "another process"
