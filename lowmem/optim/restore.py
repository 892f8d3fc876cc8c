"""A saved optimizer state, put back strictly: `convert.py` makes it into one of other settings."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lowmem.errors import CheckpointError
from lowmem.optim.method import Reallocating
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.weights import like

Numbers = Mapping[str, int | float]


@torch.no_grad()
def restore_states(
    optimizer: Optimizer,
    tensors: Iterable[tuple[str, Tensor]],
    numbers: Mapping[str, Numbers],
    updates: int,
) -> None:
    """Put back what `state_tensors` and `state_numbers` gave, and the number of updates.

    CheckpointError names what is missing or foreign.
    """
    for name, slot in optimizer.slots.items():
        if isinstance(slot.method, Reallocating):
            slot.method.reallocate(like(slot.weight), slot.state, numbers.get(name, {}))
    optimizer.put_states_away()
    for _, value, mine in matched(tensors, dict(optimizer.state_tensors())):
        mine.copy_(value)
    expected = optimizer.state_numbers()
    if {n: set(v) for n, v in numbers.items()} != {n: set(v) for n, v in expected.items()}:
        raise missing_state(
            "the counters of " + next(iter(set(expected) ^ set(numbers)), "a weight")
        )
    for name, values in numbers.items():
        optimizer.slots[name].state.update(values)
    optimizer.updates = updates


def matched(
    tensors: Iterable[tuple[str, Tensor]], expected: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, saved, expected), one by one; CheckpointError as soon as they are not the same."""
    for key, value in tensors:
        mine = expected.pop(key, None)
        if mine is None or mine.shape != value.shape or mine.dtype != value.dtype:
            raise _foreign_state(key, value, mine)
        yield key, value, mine
    if expected:
        raise missing_state(next(iter(expected)))


def _foreign_state(key: str, value: Tensor, mine: Tensor | None) -> CheckpointError:
    """A saved tensor that is not there, or is of another shape or dtype."""
    has = f"{tuple(value.shape)} {value.dtype}"
    wants = "nothing of that name" if mine is None else f"{tuple(mine.shape)} {mine.dtype}"
    return CheckpointError(
        f"optimizer state {key} does not belong to this run",
        f"the checkpoint has {has}, this run expects {wants}",
        "resume with the settings the checkpoint was written with",
    )


def missing_state(key: str) -> CheckpointError:
    """A state that the checkpoint ought to have."""
    return CheckpointError(
        f"the checkpoint lacks optimizer state {key}",
        "this run's method or settings differ from those that were saved",
        "resume with the settings the checkpoint was written with",
    )
