"""When a subspace is chosen anew."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lowmem.optim.formats import State
from lowmem.optim.place import Place
from lowmem.optim.refresh import Every


def due(every: Every, place: Place, updates: int) -> list[int]:
    """The updates before which the subspace is chosen anew."""
    state: State = {"step": 0}
    every.init(state, place)
    found = []
    for step in range(updates):
        state["step"] = step
        if every.due(state):
            found.append(step)
            every.refreshed(state)
    return found


@given(gap=st.integers(1, 50), updates=st.integers(1, 200), index=st.integers(0, 6))
def test_as_published_a_subspace_lives_for_gap_updates(gap: int, updates: int, index: int) -> None:
    found = due(Every(gap, staggered=False), Place(index=index, count=7), updates)
    assert found == list(range(0, updates, gap))


@given(gap=st.integers(1, 50), count=st.integers(1, 60))
def test_staggered_refreshes_share_the_updates_evenly(gap: int, count: int) -> None:
    turns = [due(Every(gap), Place(index=i, count=count), 3 * gap) for i in range(count)]
    for found in turns:
        assert found[0] == 0  # there must be a basis
        assert {later - earlier for earlier, later in pairwise(found[1:])} <= {gap}
        assert gap in found or found[1] < gap
    refreshed = [sum(step in found for found in turns) for step in range(gap, 3 * gap)]
    assert max(refreshed) <= -(-count // gap)
