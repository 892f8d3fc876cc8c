"""Learning rates against the recorded schedules and against what every schedule promises."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lowmem.config.schema import ScheduleConfig
from lowmem.train.schedule import learning_rate

ORACLE = load_file(Path(__file__).parent / "oracles" / "schedules__basic.safetensors")
TOTAL = 60  # of the oracle


@pytest.mark.parametrize(
    ("name", "schedule", "peak", "known"),
    [
        ("cosine_min10", ScheduleConfig(kind="cosine", warmup=6, start="zero"), 1.0, 60),
        ("cosine_min10", ScheduleConfig(kind="cosine", warmup=0.1, start="zero"), 1.0, 60),
        ("cosine_min10", ScheduleConfig(warmup=6, start="zero", cycle=60), 1.0, 60),
        ("linear", ScheduleConfig(kind="linear", warmup=6, min_ratio=0.0, start="zero"), 1.0, 63),
        ("rex", ScheduleConfig(kind="rex", warmup=0, min_ratio=0.1), 0.01, 63),
    ],
)
def test_follows_the_recorded_schedule(
    name: str, schedule: ScheduleConfig, peak: float, known: int
) -> None:
    """The linear and rex recordings go on for three updates after the last."""
    ours = [learning_rate(schedule, peak, update, TOTAL) for update in range(known)]
    assert ours == pytest.approx(ORACLE[name].tolist(), rel=0, abs=1e-12)  # both in float64


def test_a_cycle_is_a_run_of_its_own() -> None:
    cycle = ScheduleConfig(warmup=0.1, cycle=40)
    alone = [learning_rate(ScheduleConfig(warmup=0.1), 1.0, u, 40) for u in range(40)]
    assert [learning_rate(cycle, 1.0, u, 100) for u in range(100)] == [*alone, *alone, *alone[:20]]


def test_the_papers_cosine_begins_every_further_cycle_with_two_steps_of_nearly_nothing() -> None:
    cycle = ScheduleConfig(warmup=10, start="zero", cycle=40)
    rates = [learning_rate(cycle, 2.0, u, 100) for u in range(90)]
    assert rates[:3] == pytest.approx([0.0, 0.2, 0.4])
    assert rates[40:43] == pytest.approx([2e-7, 2e-7, 0.4])
    assert rates[42:80] == rates[2:40]


def test_warm_up_wastes_no_update_and_reaches_the_peak_after_it() -> None:
    rates = [learning_rate(ScheduleConfig(warmup=4), 10.0, u, 40) for u in range(6)]
    assert rates[:5] == pytest.approx([2.0, 4.0, 6.0, 8.0, 10.0])
    assert rates[5] < 10.0


def test_warm_up_of_the_papers_starts_at_zero() -> None:
    schedule = ScheduleConfig(warmup=4, start="zero")
    rates = [learning_rate(schedule, 10.0, u, 40) for u in range(5)]
    assert rates == pytest.approx([0.0, 2.5, 5.0, 7.5, 10.0])


def test_wsd_is_stable_and_then_falls_in_a_straight_line() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup=10, decay=0.2, min_ratio=0.5)
    rates = [learning_rate(schedule, 1.0, u, 100) for u in range(110)]
    assert rates[10:81] == [1.0] * 71
    assert rates[80:101] == pytest.approx([1.0 - 0.5 * k / 20 for k in range(21)])
    assert rates[101:] == [0.5] * 9


def test_wsd_that_decays_from_the_start_begins_after_warm_up() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup=10, decay=1.0, min_ratio=0.0)
    assert learning_rate(schedule, 1.0, 10, 100) == 1.0
    assert learning_rate(schedule, 1.0, 55, 100) == pytest.approx(0.5)


def test_decay_that_is_shorter_than_an_update_comes_after_the_last() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup=0, decay=0.1, min_ratio=0.5)
    assert [learning_rate(schedule, 1.0, u, 3) for u in range(5)] == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_constant_warms_up_and_stays() -> None:
    schedule = ScheduleConfig(kind="constant", warmup=3)
    rates = [learning_rate(schedule, 4.0, u, 8) for u in range(12)]
    assert rates == pytest.approx([1.0, 2.0, 3.0] + [4.0] * 9)


def test_warm_up_longer_than_the_run_never_exceeds_it() -> None:
    rates = [learning_rate(ScheduleConfig(warmup=100), 1.0, u, 9) for u in range(10)]
    assert rates == pytest.approx([0.1 * k for k in range(1, 10)] + [0.1])


schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd", "rex"]),
    warmup=st.integers(0, 50) | st.floats(0.0, 1.0, exclude_max=True),
    min_ratio=st.floats(0.0, 1.0),
    decay=st.floats(0.01, 1.0),
    start=st.sampled_from(["first", "zero"]),
)


@settings(deadline=None)
@given(schedules, st.floats(1e-6, 10.0), st.integers(1, 120))
def test_every_schedule_rises_once_then_falls_to_its_end(
    schedule: ScheduleConfig, peak: float, updates: int
) -> None:
    rates = [learning_rate(schedule, peak, u, updates) for u in range(updates + 5)]
    assert all(0.0 <= rate <= peak for rate in rates)
    if schedule.start == "first":
        assert rates[0] > 0.0 or schedule.min_ratio == 0.0
    top = max(range(updates + 1), key=lambda u: rates[u])
    slack = 1e-15 * peak  # rounding of one multiplication
    assert all(a <= b + slack for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - slack for a, b in pairwise(rates[top:]))
    end = peak if schedule.kind == "constant" else peak * schedule.min_ratio
    assert rates[updates:] == pytest.approx([end] * 5, rel=1e-12, abs=slack)
