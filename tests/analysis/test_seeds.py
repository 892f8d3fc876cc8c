"""Confidence intervals against the definition of Student's t."""

import math

import pytest

from lowmem.analysis.seeds import _T, interval


def share_within(quantile: float, freedom: int) -> float:
    """P(|t| <= quantile) by Simpson's rule over the density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    steps = 4000
    width = quantile / steps
    heights = [(1 + (n * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for n in range(steps + 1)]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 2 * scale * width / 3 * (heights[0] + inner + heights[-1])


@pytest.mark.parametrize("freedom", range(1, len(_T) + 1))
def test_the_quantiles_hold_95_percent(freedom: int) -> None:
    # Four decimals of a quantile.
    assert share_within(_T[freedom - 1], freedom) == pytest.approx(0.95, abs=2e-5)


def test_the_interval_of_three_values() -> None:
    found = interval([1.0, 2.0, 3.0])
    half = 4.3027 * 1.0 / math.sqrt(3)  # deviation 1, two degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


def test_one_value_has_no_interval() -> None:
    assert (interval([2.0]).mean, interval([2.0]).low, interval([2.0]).high) == (2.0, None, None)


def test_many_values_use_the_last_quantile() -> None:
    values = [float(n % 2) for n in range(100)]
    found = interval(values)
    assert found.low is not None
    deviation = math.sqrt(100 * 0.25 / 99)
    assert found.mean - found.low == pytest.approx(_T[-1] * deviation / 10)
