"""Numbers of curves, and axes that hold them."""

import math

import pytest

from lowmem.analysis.axes import Axis, tick_text
from lowmem.analysis.figures import losses, smoothed, thinned
from lowmem.analysis.history import read_all
from lowmem.errors import ConfigError
from tests.analysis.conftest import PAPERS, Make


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_smoothing_is_the_weighted_mean_of_all_before(window: int) -> None:
    values = [5.0, 3.0, 4.0, 1.0, 2.5]
    keep = 1 - 2 / (window + 1)
    for end, found in enumerate(smoothed(values, window), start=1):
        weights = [keep ** (end - 1 - n) for n in range(end)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert found == pytest.approx(mean)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    found = smoothed([math.nan, 2.0, math.inf, 4.0], 3)
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([2.0, 2.0, (0.5 * 2 + 4) / 1.5])


AXES = [
    (0.0, 1.0, False),
    (0.0, 122.88, False),
    (4.4999, 4.5001, False),
    (-3.0, 7e9, False),
    (1e-5, 1e-4, False),
    (34.88, 9000.0, True),
    (99.0, 101.0, True),
    (1e-9, 1e12, True),
]


@pytest.mark.parametrize(("low", "high", "log"), AXES)
@pytest.mark.parametrize("most", [2, 5, 8])
def test_ticks_are_few_round_and_within_the_axis(
    low: float, high: float, log: bool, most: int
) -> None:
    ticks = Axis("", low, high, log).ticks(most)
    assert len(ticks) <= most
    assert len(ticks) >= 2 or most == 2
    room = 1e-9 * (high - low)
    assert all(low - room <= tick <= high + room for tick in ticks)
    assert len({tick_text(tick) for tick in ticks}) == len(ticks)
    for tick in ticks:
        digits = f"{tick:.6e}".partition("e")[0].rstrip("0")
        assert len(digits) <= (3 if high / max(low, 1e-30) > 1.1 else 7), tick


@pytest.mark.parametrize(("low", "high", "log"), AXES)
def test_an_axis_places_its_ends(low: float, high: float, log: bool) -> None:
    axis = Axis("", low, high, log)
    assert (axis.share(low), axis.share(high)) == pytest.approx((0.0, 1.0))
    middle = math.sqrt(low * high) if log else (low + high) / 2
    assert axis.share(middle) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[], [math.nan], [2.0], [0.0], [-1.0, math.inf]])
@pytest.mark.parametrize("log", [True, False])
def test_an_axis_exists_for_any_values(values: list[float], log: bool) -> None:
    axis = Axis.over("", values, log=log, room=0.05)
    assert axis.low < axis.high
    assert axis.low > 0 or not log
    assert axis.ticks(5) is not None


def test_thinning_keeps_both_ends() -> None:
    points = [(float(n), 0.0) for n in range(1001)]
    kept = thinned(points, 100)
    assert len(kept) == 100
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thinned(points[:5], 100) == points[:5]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ("tokens", [128.0, 256.0, 384.0, 512.0]),
        ("time", [0.5, 1.0, 1.5, 2.0]),
        ("update", [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_losses_stand_where_they_were_reached(
    make_run: Make, x: str, expected: list[float]
) -> None:
    (curve,) = losses(read_all([make_run("a")]), x, "loss", 1).curves
    assert [place for place, _ in curve.line] == expected
    assert [loss for _, loss in curve.line] == [6.0, 5.0, 4.5, 4.2]
    assert curve.points == [(expected[-1], 4.0)]


def test_against_memory_a_run_is_one_point(make_run: Make) -> None:
    figure = losses(read_all([make_run("a", peak=3 * 2**20)]), "memory", "perplexity", None)
    assert figure.curves[0].line == []
    assert figure.curves[0].points == [(3.0, pytest.approx(math.exp(4.0)))]
    assert figure.x.label == "peak memory (tensors), MiB"


def test_runs_of_one_name_are_told_by_their_paths(make_run: Make) -> None:
    one, other = make_run("a"), make_run("b")
    moved = other.rename(other.parent.parent / "a")
    names = [c.name for c in losses(read_all([one, moved]), "tokens", "loss", None).curves]
    assert names == [str(one), str(moved)]


def test_published_results_are_marked_at_their_tokens(make_run: Make) -> None:
    runs = read_all([make_run("a", model="llama-60m", method="galore", data=PAPERS)])
    figure = losses(runs, "tokens", "perplexity", None)
    assert (1.31e9, pytest.approx(34.88)) in [(mark.x, mark.y) for mark in figure.marks]
    assert (1.31e9, pytest.approx(30.05)) in [(mark.x, mark.y) for mark in figure.marks]
    assert figure.x.log  # a run of 512 tokens beside 1.31 billion
    assert all(figure.x.low < mark.x < figure.x.high for mark in figure.marks)
    assert losses(runs, "time", "perplexity", None).marks == []


def test_without_published_results_the_figure_says_why(make_run: Make) -> None:
    figure = losses(read_all([make_run("a")]), "tokens", "loss", None)
    assert figure.marks == []
    assert any("protocol lowmem is not that of the papers" in note for note in figure.notes)


@pytest.mark.parametrize(("x", "y"), [("tokns", "loss"), ("tokens", "ppl")])
def test_unknown_axes_are_refused(make_run: Make, x: str, y: str) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        losses(read_all([make_run("a")]), x, y, None)


def test_smoothing_is_stated(make_run: Make) -> None:
    runs = read_all([make_run("a")])
    assert "over 7 updates" in losses(runs, "tokens", "loss", 7).notes[0]
    assert "not smoothed" in losses(runs, "tokens", "loss", None).notes[0]
