"""When a subspace is chosen anew."""

from hypothesis import given
from hypothesis import strategies as st

from lowmem.optim.refresh import Every


@given(gap=st.integers(1, 50), updates=st.integers(1, 200))
def test_a_subspace_lives_for_gap_updates(gap: int, updates: int) -> None:
    due = [step for step in range(updates) if Every(gap).due(step)]
    assert due == list(range(0, updates, gap))
