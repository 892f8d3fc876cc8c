"""The lazy gap: as published, and as we mend it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.optim.formats import State, number, tensor
from lowmem.optim.place import Place
from lowmem.optim.refresh import Lazy

ALONE = Place()
cosine = st.floats(-1.0, 1.0, width=32)


def follow(
    lazy: Lazy, similarities: list[float], updates: int, place: Place = ALONE
) -> tuple[list[int], list[int]]:
    """(updates with a refresh, gap after each update); refresh i has similarity i, cyclically."""
    state: State = {"step": 0, "log.similarity": torch.zeros(())}
    lazy.init(state, place)
    refreshes: list[int] = []
    gaps = []
    for step in range(updates):
        state["step"] = step
        if lazy.due(state):
            measured = similarities[len(refreshes) % len(similarities)]
            tensor(state, "log.similarity").fill_(measured)
            refreshes.append(step)
            lazy.refreshed(state)
        gaps.append(number(state, "gap"))
    assert tensor(state, "log.gap").item() == gaps[-1]
    return refreshes, gaps


def published(
    gap: int, theta: float, gamma: float, length: int, cosines: list[float], updates: int
) -> tuple[list[int], list[int]]:
    """The released rule, written slowly."""
    queue: list[float] = []
    refreshes: list[int] = []
    gaps = []
    for step in range(updates):
        if step % gap == 0:
            if refreshes:
                queue.append(cosines[len(refreshes) % len(cosines)])
                queue = queue[-length:]
                if len(queue) == length and sum(queue) / length >= theta:
                    gap = int(gap * gamma)
            refreshes.append(step)
        gaps.append(gap)
    return refreshes, gaps


@given(
    gap=st.integers(1, 6),
    theta=st.floats(-0.5, 0.9),
    gamma=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    length=st.integers(1, 4),
    cosines=st.lists(cosine, min_size=1, max_size=7),
)
def test_without_our_mends_it_is_the_published_rule(
    gap: int, theta: float, gamma: float, length: int, cosines: list[float]
) -> None:
    lazy = Lazy(gap, theta, gamma, length, limit=1e9, clear=False, staggered=False)
    assert follow(lazy, cosines, 100) == published(gap, theta, gamma, length, cosines, 100)


def test_the_queue_is_cleared_when_the_gap_grows() -> None:
    """As published, a full queue lets every following refresh double the gap again."""
    lazy = Lazy(2, queue=3, limit=1e9, staggered=False)
    refreshes, gaps = follow(lazy, [0.9], 60)
    doubled = [step for step, (old, new) in enumerate(pairwise(gaps), 1) if new > old]
    between = [sum(a < r <= b for r in refreshes) for a, b in pairwise(doubled)]
    assert between
    assert set(between) == {3}
    _, runaway = follow(Lazy(2, queue=3, limit=1e9, clear=False, staggered=False), [0.9], 60)
    assert runaway[-1] > gaps[-1]


@pytest.mark.parametrize("limit", [1.0, 3.0, 8.0])
def test_the_gap_is_limited(limit: float) -> None:
    _, gaps = follow(Lazy(5, queue=1, limit=limit), [1.0], 1000)
    assert max(gaps) == 5 * limit


def test_a_changing_subspace_keeps_its_gap() -> None:
    refreshes, gaps = follow(Lazy(5, queue=2), [0.1, 0.6], 100)  # mean 0.35
    assert set(gaps) == {5}
    assert refreshes == list(range(0, 100, 5))


@given(gap=st.integers(1, 30), count=st.integers(1, 40), index=st.integers(0, 39))
def test_staggered_refreshes_come_at_their_offset(gap: int, count: int, index: int) -> None:
    place = Place(index=index % count, count=count)
    refreshes, gaps = follow(Lazy(gap, queue=2, limit=4.0), [1.0], 12 * gap, place)
    offset = place.index * gap // count
    assert all((step - offset) % gap == 0 for step in refreshes[1:])
    for earlier, later in pairwise(refreshes[1:]):
        assert later - earlier <= gaps[later - 1]


def test_a_refresh_soon_after_the_first_is_not_asked() -> None:
    """Matrix 1 of 10 has its second refresh after one update, which tells nothing of a gap."""
    similar_at_first = [0.0, 1.0, *[0.0] * 50]
    _, gaps = follow(Lazy(10, queue=1), similar_at_first, 100, Place(index=1, count=10))
    assert set(gaps) == {10}


def test_nothing_is_read_on_meta() -> None:
    state: State = {"step": 10, "log.similarity": torch.zeros((), device="meta")}
    lazy = Lazy(5, queue=1)
    lazy.init(state, Place())
    lazy.refreshed(state)
    assert state["gap"] == 5


def test_a_resumed_run_goes_on_with_queue_and_gap() -> None:
    lazy = Lazy(2, queue=3, staggered=False)
    state: State = {"step": 0, "log.similarity": torch.tensor(0.9)}
    lazy.init(state, Place())
    copies = []
    for step in range(0, 40, 2):
        state["step"] = step
        copies.append(
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        )
        if lazy.due(state):
            lazy.refreshed(state)
    for start, copy in enumerate(copies):
        assert copy.keys() == state.keys()
        for step in range(2 * start, 40, 2):
            copy["step"] = step
            if lazy.due(copy):
                lazy.refreshed(copy)
        assert copy["gap"] == state["gap"]
        assert copy["queued"] == state["queued"]
