"""Which part of an update is running, as a stack of words that the memory tracker reads.

with phase("backward of block 7"):
    with phase("gradient of mlp.down"): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager

_stack: list[str] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark everything inside as belonging to `name`; nests."""
    _stack.append(name)
    try:
        yield
    finally:
        _stack.pop()


def current_phase() -> tuple[str, ...]:
    """The phases that are open now, outermost first."""
    return tuple(_stack)
