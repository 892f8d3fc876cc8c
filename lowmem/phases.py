"""Which part of an update is running, as a stack of words that the memory tracker reads.

with phase("backward of block 7"):
    with phase("gradient of mlp.down"): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager

_stack: list[str] = []
_RAISED_IN = "raised_in_phases"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark everything inside as belonging to `name`; nests."""
    _stack.append(name)
    try:
        yield
    except Exception as error:
        vars(error).setdefault(_RAISED_IN, current_phase())  # the innermost is asked first
        raise
    finally:
        _stack.pop()


def current_phase() -> tuple[str, ...]:
    """The phases that are open now, outermost first."""
    return tuple(_stack)


def phases_of(error: Exception) -> tuple[str, ...]:
    """The phases that were open when `error` was raised, outermost first; it may have left them."""
    phases: tuple[str, ...] = vars(error).get(_RAISED_IN, ())
    return phases


def sentence(phases: tuple[str, ...]) -> str:
    """The moment as people say it: "backward of block 32, gradient of mlp.down"."""
    return ", ".join(dict.fromkeys(phases)) or "between phases"
