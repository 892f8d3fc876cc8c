"""What lives as long as a run: weights, states, and the tables they look up."""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from lowmem.kernels.blockwise import lookup_tables
from lowmem.kernels.grouped_weight import Weight
from lowmem.kernels.random_normal import lookup_table
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.live_bytes import GRANULE, LiveBytes
from lowmem.transfers import HOST


def track_persistent(
    tracker: LiveBytes, optimizer: Optimizer, names: Iterable[str] | None = None
) -> None:
    """Count what lives as long as the run. names: of the weights; all of the optimizer's else."""
    for part, tensor in [*persistent_tensors(optimizer, names), *host_tensors(optimizer, names)]:
        tracker.track([tensor], part)


def persistent_tensors(
    optimizer: Optimizer, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(part, tensor) of weights, states and the tables they need; a table may come repeatedly.

    Also of what host sums pass through, which belongs to no weight; what lives in host memory is
    left out.
    """
    chosen = list(optimizer.slots if names is None else names)
    if optimizer.staging is not None:
        yield from (("staging", place) for place in optimizer.staging.places)
    for name in chosen:
        slot = optimizer.slots[name]
        if name not in optimizer.away:
            yield from (("weights", tensor) for tensor in stored(slot.weight))
        for key, value in slot.state.items() if optimizer.states == "device" else ():
            if isinstance(value, Tensor):
                yield "projections" if key.endswith("basis") else "states", value
    yield from tables(optimizer, chosen)


def host_tensors(
    optimizer: Optimizer, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(HOST, tensor) of what lives in host memory for the whole run."""
    for name in optimizer.slots if names is None else names:
        slot = optimizer.slots[name]
        if name in optimizer.away:
            yield from ((HOST, tensor) for tensor in stored(slot.weight))
        for value in slot.state.values() if optimizer.states == "host" else ():
            if isinstance(value, Tensor):
                yield HOST, value


def tables(
    optimizer: Optimizer, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(part, tensor) of the constants that 8-bit states and drawn bases look up."""
    for name in optimizer.slots if names is None else names:
        device = str(optimizer.device)
        for key in optimizer.slots[name].state:
            if key.endswith(".codes"):
                yield from (("states", table) for table in lookup_tables(device))
            if key.endswith(("basis", "basis.codes")):  # its start is random, or all of it
                yield "projections", lookup_table(device)


def bytes_by_part(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes of real tensors by part, each storage once and rounded up as the allocator does."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for part, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[part] = found.get(part, 0) + -(-storage.nbytes() // GRANULE) * GRANULE
    return found


def stored(weight: Weight) -> list[Tensor]:
    """The tensors that hold a weight."""
    return [weight] if isinstance(weight, Tensor) else [weight.codes, weight.scales, weight.zeros]


def persistent_bytes(owner: Optimizer, blocks: int) -> int:
    """Weights and states of a model with so many blocks, from its optimizer or that of two."""
    tracker = LiveBytes("meta")
    second = [name for name in owner.slots if name.startswith(block_prefix(1))]
    track_persistent(tracker, owner, [name for name in owner.slots if name not in second])
    others = tracker.live
    track_persistent(tracker, owner, second)
    return tracker.live + (blocks - depth_of(owner)) * (tracker.live - others)


def stored_bytes(owner: Optimizer, blocks: int) -> int:
    """Weights and states in a checkpoint of a model with so many blocks, from the same owner."""

    def of(names: Iterable[str]) -> int:
        slots = [owner.slots[name] for name in names]
        states = [value for slot in slots for value in slot.state.values()]
        weights = [tensor for slot in slots for tensor in stored(slot.weight)]
        return sum(each.nbytes for each in [*weights, *states] if isinstance(each, Tensor))

    second = [name for name in owner.slots if name.startswith(block_prefix(1))]
    return of(owner.slots) + (blocks - depth_of(owner)) * of(second)


_BLOCK_NAME = re.compile(r"model\.layers\.(\d+)\.")


def block_prefix(index: int) -> str:
    return f"model.layers.{index}."


def kin(name: str) -> str:
    """A weight's name without the number of its block."""
    return _BLOCK_NAME.sub("", name)


def depth_of(owner: Optimizer) -> int:
    return len({match[0] for match in map(_BLOCK_NAME.match, owner.slots) if match})
