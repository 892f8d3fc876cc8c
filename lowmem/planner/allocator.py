"""What PyTorch's caching allocator makes of a list of allocations: the peaks it will report.

    replay([(1, 100), (2, 3 * MIB), (1, -100)], expandable=False)
        -> tensors 3 MiB + 512, allocated the same, reserved 2 MiB (small pool) + 20 MiB (large)

Replay at least two updates: the classic allocator may need more for the second than for the
first, because best fit meets other holes. One device, one stream, memory without end: what the
allocator gives back when the card is full is not modelled.

Source: github.com/pytorch/pytorch, c10/cuda/CUDACachingAllocator.cpp (round_size, get_pool,
get_free_block, should_split, get_allocation_size, try_allocate_expandable_block) and
c10/core/AllocatorConfig.h.
"""

import os
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from lowmem.units import MIB

Event = tuple[int, int]
"""(storage, bytes): positive bytes allocate, negative ones free, an empty storage owns nothing."""

_GRANULE = 512
_LARGEST_SMALL = MIB  # requests up to this come from the small pool
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * MIB, 20 * MIB
_OWN_SEGMENT = 10 * MIB  # requests from here on get a segment of their own


@dataclass(frozen=True)
class Peaks:
    """Highest bytes, each at its own moment.

    tensors: live storages, each rounded up to 512 B. allocated: `max_memory_allocated`, with the
    ends of blocks that were too small to split off. reserved: `max_memory_reserved`.
    """

    tensors: int
    allocated: int
    reserved: int


def expandable_segments() -> bool:
    """Will a run started from here use them? Yes, unless the user configured something else."""
    told = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return told is None or "expandable_segments:true" in told.lower()


def replay(events: Iterable[Event], *, expandable: bool) -> Peaks:
    """Peaks after all `events`, with `expandable_segments:True` or the classic allocator.

    ValueError: an event frees what is not live, or allocates what is.
    """
    allocator = Allocator(expandable)
    allocator.run(events)
    return allocator.peaks


class Allocator:
    """The state between events; `reset_peaks` forgets as `reset_peak_memory_stats` does."""

    def __init__(self, expandable: bool) -> None:
        self._small = _Pool(_SMALL_SEGMENT, expandable)
        self._large = _Pool(_LARGE_SEGMENT, expandable)
        self._live: dict[int, tuple[_Pool, _Block, int]] = {}
        self._tensors = self._allocated = self._most_tensors = self._most_allocated = 0

    @property
    def peaks(self) -> Peaks:
        """Since the beginning or the last `reset_peaks`; `reserved` never falls."""
        reserved = self._small.reserved + self._large.reserved
        return Peaks(self._most_tensors, self._most_allocated, reserved)

    def reset_peaks(self) -> None:
        self._most_tensors, self._most_allocated = self._tensors, self._allocated

    def run(self, events: Iterable[Event]) -> None:
        """ValueError as in `replay`."""
        for storage, count in events:
            if count > 0:
                self._take(storage, count)
            elif count < 0:
                self._give_back(storage)

    def _take(self, storage: int, count: int) -> None:
        if storage in self._live:
            raise ValueError(f"storage {storage} is allocated twice")
        size = _round_up(count, _GRANULE)
        pool = self._small if size <= _LARGEST_SMALL else self._large
        block = pool.allocate(size)
        self._live[storage] = (pool, block, size)
        self._tensors, self._allocated = self._tensors + size, self._allocated + block.size
        self._most_tensors = max(self._most_tensors, self._tensors)
        self._most_allocated = max(self._most_allocated, self._allocated)

    def _give_back(self, storage: int) -> None:
        if storage not in self._live:
            raise ValueError(f"storage {storage} is freed but not allocated")
        pool, block, size = self._live.pop(storage)
        self._tensors, self._allocated = self._tensors - size, self._allocated - block.size
        pool.release(block)


@dataclass(eq=False, slots=True)
class _Block:
    """A piece of a segment, linked with the pieces that touch it."""

    start: int
    size: int
    before: "_Block | None" = None
    after: "_Block | None" = None
    free: bool = True


@dataclass
class _Pool:
    """All segments of one pool. `reserved` never falls, so it is its own peak."""

    segment: int  # bytes of a new segment, or of an expandable page
    expandable: bool
    reserved: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)  # free: (size, start), sorted
    by_start: dict[int, _Block] = field(default_factory=dict)  # the same blocks
    tail: _Block | None = None  # the last block of the expandable range

    def allocate(self, size: int) -> _Block:
        """A block of at least `size`, a multiple of 512; the rest of it is split off or kept."""
        block = self._best_fit(size) or (
            self._grow(size) if self.expandable else self._new_segment(size)
        )
        # Classic large blocks keep a rest up to 1 MiB, which then counts as allocated.
        keeps = 0 if self.expandable or self.segment == _SMALL_SEGMENT else _LARGEST_SMALL
        if block.size - size > keeps:
            self._split(block, size)
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        """Free a block and join it with free neighbours of its segment."""
        if block.after is not None and block.after.free:
            self._take(block.after)
            self._absorb(block, block.after)
        if block.before is not None and block.before.free:
            self._take(block.before)
            self._absorb(block.before, block)
            block = block.before
        block.free = True
        self._offer(block)

    def _best_fit(self, size: int) -> _Block | None:
        """The smallest free block that is large enough, the lowest among equals."""
        index = bisect_left(self.blocks, (size, 0))
        if index == len(self.blocks):
            return None
        block = self.by_start[self.blocks[index][1]]
        # The tail can grow, so the allocator counts it as the largest block of all.
        if block is self.tail and index + 1 < len(self.blocks):
            block = self.by_start[self.blocks[index + 1][1]]
        self._take(block)
        return block

    def _new_segment(self, size: int) -> _Block:
        """A segment of its own for large requests, else one that is shared."""
        count = _round_up(size, _SMALL_SEGMENT) if size >= _OWN_SEGMENT else self.segment
        block = _Block(self.reserved, count)
        self.reserved += count
        return block

    def _grow(self, size: int) -> _Block:
        """Map pages behind the tail, as many as `size` needs beyond what the tail has free."""
        block = self.tail
        if block is not None and block.free:
            self._take(block)
        else:
            block = _Block(self.reserved, 0)
            if self.tail is not None:
                _link(self.tail, block)
            self.tail = block
        count = _round_up(size - block.size, self.segment)
        block.size += count
        self.reserved += count
        return block

    def _split(self, block: _Block, size: int) -> None:
        """Keep the first `size` bytes of `block` and offer the others."""
        rest = _Block(block.start + size, block.size - size)
        block.size = size
        _link(rest, block.after)
        _link(block, rest)
        if block is self.tail:
            self.tail = rest
        self._offer(rest)

    def _absorb(self, first: _Block, second: _Block) -> None:
        """Make `second`, which follows `first`, a part of it."""
        first.size += second.size
        _link(first, second.after)
        if second is self.tail:
            self.tail = first

    def _offer(self, block: _Block) -> None:
        insort(self.blocks, (block.size, block.start))
        self.by_start[block.start] = block

    def _take(self, block: _Block) -> None:
        del self.blocks[bisect_left(self.blocks, (block.size, block.start))]
        del self.by_start[block.start]


def _link(first: _Block, second: _Block | None) -> None:
    first.after = second
    if second is not None:
        second.before = first


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
