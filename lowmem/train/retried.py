"""Calls that are repeated where they ran out of memory, without leaving the place.

A call that fails to allocate has changed nothing, and who made it still holds every operand. So
whatever a method writes, and in whichever order, its update is never half made: the call is
repeated once memory has been freed, and the work goes on behind it.
"""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RetriedCalls(TorchDispatchMode):
    """Inside, every tensor operation that runs out of memory is repeated after each of `helps`.

    helps: are given the error, and say whether there is reason to try again. Costs about 3
    microseconds a call, so it stands around what cannot be repeated as a whole, and not around
    everything.
    """

    def __init__(self, helps: Sequence[Callable[[torch.OutOfMemoryError], bool]]) -> None:
        super().__init__()
        self._helps = helps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for help in self._helps:
            try:
                return func(*args, **(kwargs or {}))
            except torch.OutOfMemoryError as error:
                failed = without_frames(error)
            if not help(failed):
                raise failed
        return func(*args, **(kwargs or {}))


def without_frames(error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
    """The error without the frames it came through: they hold the tensors of what failed."""
    traceback.clear_frames(error.__traceback__)
    return error.with_traceback(None)
