"""One trial of a sweep: a lowmem command in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem.config.flags import ENVIRONMENT
from lowmem.errors import short
from lowmem.train.guard import StopRequest

_POLL_SECONDS = 0.2
_LAST_LINES = 3  # of a log, where a trial said no error


def run_trial(arguments: Sequence[str], log: Path, stop: StopRequest) -> int:
    """The exit code of a lowmem command in a process of its own; its output is added to `log`.

    A request to stop is handed on, so that the trial saves; a second Ctrl-C ends it at once. It
    has its own session, or the terminal would send it every Ctrl-C too.
    """
    command = [sys.executable, "-m", "lowmem", *arguments]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_without_settings(os.environ),
            start_new_session=True,
        )
        told = False
        try:
            while True:
                if stop and not told:
                    told = True
                    process.send_signal(signal.SIGTERM)
                try:
                    return process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            process.wait()
            raise


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings: they are in the trial's file, and must not override it."""
    taken = {*ENVIRONMENT, "LOWMEM_CONFIG"}
    return {name: value for name, value in environ.items() if name not in taken}


def why_it_ended(log: Path, begun: int, code: int) -> str:
    """The error that a process told, or its last words."""
    text = log.read_bytes()[begun:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return short(told[-1], 200)
    ended = f"killed by signal {-code}" if code < 0 else f"exit {code}"
    return short(f"{ended}: {' / '.join(lines[-_LAST_LINES:])}", 200)
