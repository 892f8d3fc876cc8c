"""Where prepared data is kept, and how files there appear: complete or not at all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowmem.errors import DataError


def cache_home() -> Path:
    """`$LOWMEM_HOME`, or `~/.cache/lowmem`; it need not exist yet."""
    chosen = os.environ.get("LOWMEM_HOME")
    return Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "lowmem"


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that `path` is either the old one or all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of new files in `folder` survive a power cut."""
    if sys.platform == "win32":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes, such as the ranks of one run.

    The system drops the lock when a process dies, so an abandoned lock file blocks nobody.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}",
            "prepared tokens are kept there",
            "point LOWMEM_HOME (or --out) at a folder you may write to",
        ) from error
    with file:
        if sys.platform != "win32":  # no advisory locks there: prepare once, then start the ranks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
