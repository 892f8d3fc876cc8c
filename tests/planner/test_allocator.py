"""The allocator model against traces worked by hand and against a slow search over all blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.planner.allocator import Event, Peaks, replay
from lowmem.units import MIB

KIB = 1024
Trace = list[Event]


def peaks(trace: Trace, expandable: bool = False) -> Peaks:
    return replay(trace, expandable=expandable)


def test_nothing_needs_nothing() -> None:
    assert peaks([]) == peaks([(1, 0), (2, 0)]) == Peaks(0, 0, 0)


def test_one_byte_takes_512_of_a_small_segment() -> None:
    assert peaks([(1, 1)]) == Peaks(512, 512, 2 * MIB)
    assert peaks([(1, 1)], expandable=True) == Peaks(512, 512, 2 * MIB)


def test_small_requests_share_a_segment_and_one_byte_more_is_large() -> None:
    """Two of 1 MiB fill the 2 MiB; the third needs another segment; 1 MiB + 1 is not small."""
    assert peaks([(1, MIB), (2, MIB)]).reserved == 2 * MIB
    assert peaks([(1, MIB), (2, MIB), (3, 1)]).reserved == 4 * MIB
    assert peaks([(1, MIB + 1)]) == Peaks(MIB + 512, MIB + 512, 20 * MIB)


def test_segments_of_large_requests() -> None:
    """Below 10 MiB they share 20; from 10 MiB on they get their own, in steps of 2 MiB."""
    assert peaks([(1, 9 * MIB), (2, 9 * MIB)]).reserved == 20 * MIB
    assert peaks([(1, 9 * MIB), (2, 9 * MIB), (3, 3 * MIB)]).reserved == 40 * MIB
    assert peaks([(1, 10 * MIB)]).reserved == 10 * MIB
    assert peaks([(1, 10 * MIB), (2, 10 * MIB + 1)]).reserved == 22 * MIB


def test_a_rest_of_one_mib_stays_in_a_large_block_and_counts_as_allocated() -> None:
    """11 MiB come as 12: the last one is not worth a block. 512 B less, and 1 MiB + 512 are."""
    assert peaks([(1, 11 * MIB)]) == Peaks(11 * MIB, 12 * MIB, 12 * MIB)
    assert peaks([(1, 11 * MIB - 512)]) == Peaks(11 * MIB - 512, 11 * MIB - 512, 12 * MIB)


def test_a_rest_of_512_bytes_is_split_off_in_the_small_pool() -> None:
    """The first leaves 1 MiB + 512 of 2 MiB, the second 512 of these for the third."""
    assert peaks([(1, MIB - 512), (2, MIB), (3, 512)]) == Peaks(2 * MIB, 2 * MIB, 2 * MIB)


def test_best_fit_prefers_the_smallest_hole() -> None:
    """Holes of 16 and 12 MiB: 12 goes into the second, so that 16 still fits into the first."""
    trace = [(1, 16 * MIB), (2, 12 * MIB), (1, -16 * MIB), (2, -12 * MIB)]
    assert peaks([*trace, (3, 12 * MIB), (4, 16 * MIB)]).reserved == 28 * MIB


def test_free_neighbours_join_and_segments_do_not() -> None:
    """Of 6 + 6 + 6 in 20 MiB two that touch serve 12; two segments of 10 do not serve 20."""
    filled = [(1, 6 * MIB), (2, 6 * MIB), (3, 6 * MIB)]
    assert peaks([*filled, (1, -1), (2, -1), (4, 12 * MIB)]).reserved == 20 * MIB
    assert peaks([*filled, (2, -1), (1, -1), (4, 12 * MIB)]).reserved == 20 * MIB
    assert peaks([*filled, (1, -1), (3, -1), (4, 12 * MIB)]).reserved == 32 * MIB
    own = [(1, 10 * MIB), (2, 10 * MIB), (1, -1), (2, -1)]
    assert peaks([*own, (3, 20 * MIB)]).reserved == 40 * MIB


def test_pools_do_not_lend_to_each_other() -> None:
    assert peaks([(1, 9 * MIB), (1, -1), (2, 512)]).reserved == 22 * MIB
    assert peaks([(1, 9 * MIB), (1, -1), (2, 512)], expandable=True).reserved == 22 * MIB


def test_a_freed_segment_is_shared_by_later_requests() -> None:
    """11 of the 24 MiB leave 13, which are split off; 23 come as 24 and keep their last MiB."""
    trace = [(1, 24 * MIB), (1, -1), (2, 11 * MIB), (3, 23 * MIB), (3, -1)]
    assert peaks(trace) == Peaks(34 * MIB, 35 * MIB, 48 * MIB)


def test_the_second_round_may_need_more_than_the_first() -> None:
    """3 and 16 MiB share 20, 18 gets its own 18. Then 3 fits best into that, and 18 nowhere."""
    trace = [(1, 3 * MIB), (2, 16 * MIB), (3, 18 * MIB), (1, -1), (2, -1), (3, -1)]
    assert peaks(trace).reserved == 38 * MIB
    assert peaks(trace * 2).reserved == 56 * MIB
    assert peaks(trace * 9).reserved == 56 * MIB


def test_expandable_memory_is_mapped_in_pages_at_the_end() -> None:
    """11 + 11 MiB of pages of 20: the second begins in the first page and maps one more."""
    assert peaks([(1, 11 * MIB)], expandable=True) == Peaks(11 * MIB, 11 * MIB, 20 * MIB)
    assert peaks([(1, 11 * MIB), (2, 11 * MIB)], expandable=True).reserved == 40 * MIB
    assert peaks([(1, 50 * MIB), (2, 50 * MIB)], expandable=True).reserved == 100 * MIB


def test_expandable_tail_grows_by_what_is_missing() -> None:
    """40 MiB freed at the end and 70 asked for: two pages more, where the classic way takes 70."""
    trace = [(1, 40 * MIB), (1, -1), (2, 70 * MIB)]
    assert peaks(trace, expandable=True).reserved == 80 * MIB
    assert peaks(trace).reserved == 110 * MIB


def test_expandable_hole_in_the_middle_does_not_grow() -> None:
    trace = [(1, 40 * MIB), (2, 20 * MIB), (1, -1), (3, 60 * MIB)]
    assert peaks(trace, expandable=True).reserved == 120 * MIB


def test_expandable_tail_is_used_last_because_it_can_grow() -> None:
    """Free are 30 MiB in the middle and 25 at the end: 22 take the middle, so 40 need 20 more."""
    trace = [(1, 30 * MIB), (2, 25 * MIB), (1, -1)]  # 60 mapped, the last 5 free
    trace += [(3, 5 * MIB), (4, 35 * MIB), (4, -1)]  # page 100: tail 40, hole 25
    assert peaks(trace, expandable=True).reserved == 100 * MIB
    assert peaks([*trace, (5, 22 * MIB), (6, 40 * MIB)], expandable=True).reserved == 100 * MIB


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="storage 7 is allocated twice"):
        peaks([(7, 1), (7, 1)])
    with pytest.raises(ValueError, match="storage 7 is freed but not allocated"):
        peaks([(7, -1)])


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Random allocations and frees; sizes around the borders of the rules."""
    sizes = st.one_of(
        st.integers(1, 3 * MIB),
        st.integers(1, 40).map(lambda count: count * MIB),
        st.sampled_from([512, MIB - 512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 21 * MIB + 1]),
    )
    trace: Trace = []
    live: list[int] = []
    for storage in range(draw(st.integers(1, 40))):
        trace.append((storage, draw(sizes)))
        live.append(storage)
        while live and draw(st.integers(0, 2)) == 0:
            trace.append((live.pop(draw(st.integers(0, len(live) - 1))), -1))
    return trace


def searched(trace: Trace, expandable: bool) -> Peaks:
    """The same rules written as a search over lists of [size, storage or None] per segment."""
    segments: dict[bool, list[list[list[int | None]]]] = {True: [], False: []}
    size_of: dict[int, int] = {}
    most = [0, 0, 0]
    for storage, count in trace:
        if count < 0:
            for segment in segments[True] + segments[False]:
                for block in segment:
                    if block[1] == storage:
                        block[1] = None
                for i in range(len(segment) - 1, 0, -1):
                    if segment[i][1] is None and segment[i - 1][1] is None:
                        segment[i - 1 : i + 1] = [[total(segment[i - 1 : i + 1]), None]]
            del size_of[storage]
            continue
        size = size_of[storage] = max(512, (count + 511) // 512 * 512)
        small = size <= MIB
        pool = segments[small]
        if expandable and not pool:
            pool.append([])
        found = [
            (expandable and block is segment[-1], block[0] or 0, s, i)
            for s, segment in enumerate(pool)
            for i, block in enumerate(segment)
            if block[1] is None and (block[0] or 0) >= size
        ]
        if found:
            _, _, s, i = min(found)
        elif expandable:
            s, segment, page = 0, pool[0], (2 if small else 20) * MIB
            if not segment or segment[-1][1] is not None:
                segment.append([0, None])
            while (segment[-1][0] or 0) < size:
                segment[-1][0] = (segment[-1][0] or 0) + page
            i = len(segment) - 1
        else:
            own = (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            pool.append([[2 * MIB if small else 20 * MIB if size < 10 * MIB else own, None]])
            s, i = len(pool) - 1, 0
        rest = (pool[s][i][0] or 0) - size
        if rest >= 512 and (small or expandable or rest > MIB):
            pool[s][i : i + 1] = [[size, storage], [rest, None]]
        else:
            pool[s][i][1] = storage
        every = [block for side in segments.values() for segment in side for block in segment]
        now = [sum(size_of.values()), total([b for b in every if b[1] is not None]), total(every)]
        most = [max(pair) for pair in zip(most, now, strict=True)]
    return Peaks(*most)


def total(blocks: list[list[int | None]]) -> int:
    return sum(block[0] or 0 for block in blocks)


@settings(deadline=None, max_examples=200)
@given(traces(), st.booleans())
def test_the_model_equals_a_search_over_all_blocks(trace: Trace, expandable: bool) -> None:
    assert replay(trace, expandable=expandable) == searched(trace, expandable)


@settings(deadline=None)
@given(traces(), st.booleans())
def test_reserved_covers_allocated_covers_tensors(trace: Trace, expandable: bool) -> None:
    found = replay(trace, expandable=expandable)
    assert found.tensors <= found.allocated <= found.reserved
    assert found.tensors == found.allocated or not expandable


@settings(deadline=None)
@given(traces())
def test_expandable_memory_needs_nothing_more_for_the_same_trace(trace: Trace) -> None:
    freed = {storage for storage, count in trace if count < 0}
    rest = [(storage, -1) for storage, count in trace if count > 0 and storage not in freed]
    whole = trace + rest
    assert replay(whole * 2, expandable=True) == replay(whole, expandable=True)
