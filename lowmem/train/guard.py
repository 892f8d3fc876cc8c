"""What can happen to a run from outside or within: signals, and a loss that is no number."""

import math
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lowmem.errors import DivergedError, OutOfMemoryError, Stopped
from lowmem.phases import phases_of, sentence

_RESUME = "close what else uses the card and resume, or train with a smaller --micro-batch"


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGUSR1 into a request; a later SIGINT interrupts at once.

    Signals can only be handled in the main thread; elsewhere requests never come.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    wanted = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
    numbers = [getattr(signal, name) for name in wanted if hasattr(signal, name)]
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


@contextmanager
def stopped_while_loading(run: str) -> Iterator[None]:
    """Until the loop takes over, a signal ends a resumed run as it would end a running one.

    Nothing has changed yet, so there is nothing to save.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Stopped(
            f"stopped by {name} before the first update; nothing has changed",
            "the run was still loading",
            f"lowmem resume {run}",
        )

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
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


def require_finite(update: int, loss: float, norm: float, mode: str) -> None:
    """DivergedError if the loss or the gradient norm is not finite; call before the step."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    made = "weights changed during backward" if mode == "fused" else "the update was not made"
    raise DivergedError(
        f"update {update}: loss {loss}, gradient norm {norm}",
        f"a number that is not finite; {made}, and nothing was saved after it",
        "a new run with a lower --lr, or with --clip",
    )
