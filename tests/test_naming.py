"""Seeds: the same for ever, and unrelated to one another."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.naming import seed_of

uses = st.tuples(st.integers(0, 200), st.text("a/0129", max_size=6), st.integers(0, 200))


@pytest.mark.parametrize(
    ("use", "seed"),
    [
        ((0, "init/lm_head.weight", 0), 3328106191254729063),
        ((42, "data order", 3), 1406998863733950210),
    ],
)
def test_seeds_of_old_runs_never_change(use: tuple[int, str, int], seed: int) -> None:
    """Another value would change initial weights, data order and rounding of every saved run."""
    assert seed_of(*use) == seed


def test_the_first_use_has_counter_0() -> None:
    assert seed_of(5, "x") == seed_of(5, "x", 0)


@given(uses, uses)
def test_different_uses_have_different_seeds(
    one: tuple[int, str, int], other: tuple[int, str, int]
) -> None:
    """Names may hold slashes and digits: (1, "2/a", 3) and (12, "a", 3) must not meet."""
    assert (seed_of(*one) == seed_of(*other)) == (one == other)


@given(uses)
def test_generators_take_every_seed(use: tuple[int, str, int]) -> None:
    seed = seed_of(*use)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_neighbouring_uses_are_unrelated() -> None:
    """Seeds of successive counters differ in half of their 63 bits."""
    count = 2000
    seeds = [seed_of(0, "round/layer", counter) for counter in range(count + 1)]
    differing = [(a ^ b).bit_count() for a, b in pairwise(seeds)]
    # 63 fair coins have variance 63 / 4; four standard errors of the mean.
    assert sum(differing) / count == pytest.approx(31.5, abs=4 * (63 / 4 / count) ** 0.5)
