"""The limiter on the growth of a norm, against its formula and against what stops it for good."""

import math

import pytest
import torch

from lowmem.optim.formats import State, tensor
from lowmem.optim.limiters import NormGrowth


def shrinks(limiter: NormGrowth, norms: list[float]) -> tuple[list[float], State]:
    """What steps of these norms are multiplied by, and the state after them."""
    state: State = {}
    limiter.init(state, torch.device("cpu"))
    return [limiter.shrink(torch.tensor(norm), state).item() for norm in norms], state


def test_the_limited_norm_grows_by_gamma_and_falls_freely() -> None:
    norms = [2.0, 10.0, 1.0, 1.005, 3.0, 1e-3, 5.0, 0.5]
    found, state = shrinks(NormGrowth(1.01), norms)
    last = None
    for norm, shrink in zip(norms, found, strict=True):
        allowed = norm if last is None else min(norm, 1.01 * (last + 1e-8))
        assert norm * shrink == pytest.approx(allowed, rel=1e-6)  # float32
        last = allowed
    assert tensor(state, "limiter_norm").item() == pytest.approx(last, rel=1e-6)


def test_growth_is_relative_to_the_limited_norm_not_to_the_raw_one() -> None:
    found, _ = shrinks(NormGrowth(1.5), [1.0, 100.0, 100.0])
    assert found == pytest.approx([1.0, 0.015, 0.0225], rel=1e-6)


@pytest.mark.parametrize("void", [0.0, math.inf, math.nan])
def test_norms_that_are_zero_or_not_finite_are_not_remembered(void: float) -> None:
    first, state = shrinks(NormGrowth(), [void])
    assert tensor(state, "limiter_norm").isinf()
    assert first == [1.0] or not math.isfinite(void)
    assert shrinks(NormGrowth(), [void, 7.0])[0][1] == 1.0
    assert shrinks(NormGrowth(), [2.0, void, 4.0])[0][2] == pytest.approx(2.02 / 4, rel=1e-6)


def test_a_huge_gamma_turns_it_off() -> None:
    assert shrinks(NormGrowth(1e30), [1e-6, 1e6, 1.0, 1e12])[0] == [1.0] * 4


def test_the_log_says_where_it_acted() -> None:
    limiter, state = NormGrowth(1.01), State()
    limiter.init(state, torch.device("cpu"))
    acted = []
    for norm in (1.0, 2.0, 0.5, 0.504, 0.6, 0.0):
        limiter.shrink(torch.tensor(norm), state)
        acted.append(tensor(state, "log.limited").item())
    assert acted == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_it_never_asks_the_device() -> None:
    """On meta, whatever looks at a value fails."""
    state: State = {}
    NormGrowth().init(state, torch.device("meta"))
    assert NormGrowth().shrink(torch.empty((), device="meta"), state).is_meta
    assert tensor(state, "limiter_norm").dtype == torch.float32
