"""What asks a run to stop, save or wait from outside: signals, and files in its folder.

touch RUN/SAVE    a checkpoint after this update
touch RUN/STOP    the same, and the run ends (exit 75), as after a signal
touch RUN/PAUSE   the run waits after this update until the file is removed
"""

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lowmem.errors import OutOfMemoryError, Stopped
from lowmem.phases import phases_of, sentence

_POLL_SECONDS = 0.5
_RESUME = "close what else uses the card and resume, or train with a smaller --micro-batch"


class StopRequest:
    """Whether somebody asked the run to stop, and how.

    signal: its name, or "STOP" for the file of that name in `folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.signal: str | None = None
        self._folder = folder

    def __bool__(self) -> bool:
        if self.signal is None and self._consumed("STOP"):
            self.signal = "STOP"
        return self.signal is not None

    def save_asked(self) -> bool:
        """Whether the file SAVE was there; it is gone then."""
        return self._consumed("SAVE")

    @property
    def paused(self) -> bool:
        """Is the file PAUSE there?"""
        return self._folder is not None and (self._folder / "PAUSE").exists()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the run is asked to stop: then True."""
        end = time.monotonic() + seconds
        while not self and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        return bool(self)

    def _consumed(self, name: str) -> bool:
        if self._folder is None or not (self._folder / name).exists():
            return False
        (self._folder / name).unlink(missing_ok=True)
        return True


@contextmanager
def stop_requests(folder: Path | None = None) -> Iterator[StopRequest]:
    """Turn the first signal into a request; a later SIGINT interrupts at once.

    folder: where STOP, SAVE and PAUSE are looked for. Signals can only be handled in the main
    thread; elsewhere only the files are heard.
    """
    request = StopRequest(folder)

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    numbers = [signal.SIGINT, *_ending()]
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending() -> list[int]:
    """SIGTERM, SIGUSR1 and SIGHUP (the terminal is closed), but not where nohup ignores that.

    Windows has only the first.
    """
    names = ("SIGTERM", "SIGUSR1", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ignored = signal.Handlers.SIG_IGN
    hangup = getattr(signal, "SIGHUP", None)
    return [n for n in numbers if n != hangup or signal.getsignal(n) != ignored]


class _Signalled(BaseException):
    """No Exception: who tries to import something optional would take it for a failure."""


@contextmanager
def stopped_before_it_began() -> Iterator[None]:
    """Until the loop takes over, SIGTERM and its kind end a command with a word and exit code 75.

    Nothing of a run has changed by then, so there is nothing to save.
    """
    heard: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)
        raise _Signalled

    numbers = _ending()
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    except BaseException:
        if not heard:
            raise
        # Whatever it has become on its way: Python itself turns it into a RuntimeError in places.
        raise Stopped(
            f"stopped by {heard[0]}; no update was under way",
            "nothing of a run has changed",
            "the same command again",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def told_out_of_memory(describe: Callable[[], tuple[str, str]] | None = None) -> Iterator[None]:
    """Turn the device's out-of-memory error into ours: in which phase, why and what helps.

    describe: (more lines of why, of what helps), asked when the failed call's tensors are gone.
    """
    import torch  # signals are handled before it has been loaded

    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        where = sentence(phases_of(error))
        reason = str(error).partition("\n")[0]
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed call
    more, helps = describe() if describe is not None else ("", "")
    raise OutOfMemoryError(
        f"the device ran out of memory although the plan fitted, {where}",
        f"{reason}\n{more}" if more else reason,
        f"{_RESUME}\n{helps}" if helps else _RESUME,
    )
