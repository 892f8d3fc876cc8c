"""Events as lines of text, with a clock that the test turns."""

import pytest

from lowmem.cli.lines import EventLines, heading
from lowmem.train.events import (
    Assigned,
    Capped,
    Converted,
    ConvertedPart,
    Diagnosed,
    Eased,
    Evaluated,
    Finished,
    Group,
    Grown,
    Measured,
    Part,
    Saved,
    Started,
    Stopping,
    Trained,
    Tried,
)
from lowmem.units import GIB


class Clock:
    """Seconds that stand still until they are set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_at(clock: Clock, interval: float = 5.0) -> EventLines:
    return EventLines(interval=interval, clock=clock, stamp=lambda: "12:00:00 ")


def trained(update: int, seconds: float = 2.0) -> Trained:
    return Trained(update, 2.0, 0.01, 1000 * (update + 1), 0.5, "gradient", seconds, 500.0, GIB)


def test_updates_come_at_most_every_interval_but_first_and_last_always() -> None:
    clock = Clock()
    lines = lines_at(clock)
    lines.of(Started(0, 100, 1000, "runs/a"))
    shown = []
    for update in range(100):
        clock.now = 1.0 * update
        rows = [row for row in lines.of(trained(update)) if heading() not in row]
        shown += [int(row.split()[1]) for row in rows]
    assert shown == [*range(1, 100, 5), 100]


def test_a_run_that_goes_on_says_what_changes_its_bits() -> None:
    lines = lines_at(Clock())
    (line,) = lines.of(Started(5, 9, 1000, "runs/a", "step-000005"))
    assert "continuing with update 6 of 9" in line
    _, told = lines.of(Started(5, 9, 1000, "runs/a", "step-000005", ["threads 1, now 2"]))
    assert told.endswith("not bit for bit: threads 1, now 2")


def test_evaluations_saves_and_signals_are_never_left_out() -> None:
    lines = lines_at(Clock())
    lines.of(trained(0))
    for event in (Evaluated(1, 2.0, 10, 1.0), Saved(2, "x", 1, 1.0, 0.1), Stopping("SIGTERM")):
        assert len(lines.of(event)) == 1
        assert len(lines.of(event)) == 1


def test_a_row_stands_under_its_heading() -> None:
    head, row = lines_at(Clock()).of(trained(0))
    assert head == "12:00:00 " + heading()
    values = ["1", "2.0000", "7.3891", "1.00e-02", "0.5", "500", "1.00", "1.00", "k"]
    assert row.split()[1:10] == values  # "1.00 k" tokens are two words
    for name, value in (("loss", "2.0000"), ("lr", "1.00e-02"), ("tok/s", "500")):
        assert head.index(name) + len(name) == row.rindex(value) + len(value)


def test_what_remains_is_the_updates_left_times_their_duration() -> None:
    lines = lines_at(Clock(), interval=0.0)
    assert lines.remaining() == "?"
    lines.of(Started(0, 31, 1000, "runs/a"))
    lines.of(trained(0, seconds=2.0))
    assert lines.remaining() == "1 min 0 s"
    lines.of(trained(30))
    assert lines.remaining() == "0.00 s"


def test_a_new_best_evaluation_is_marked() -> None:
    lines = lines_at(Clock())
    for best in (True, False):
        assert ("best so far" in lines.of(Evaluated(0, 2.0, 10, 1.0, best=best))[0]) is best


def test_the_measured_peak_stands_beside_the_planned() -> None:
    (line,) = lines_at(Clock()).of(Measured("allocated", 2 * GIB, GIB))
    assert "peak of allocated 1.00 GiB (plan 2.00 GiB, -50.0%)" in line


def test_memory_by_category_is_for_those_who_ask() -> None:
    parts = [Part("weights", GIB, GIB), Part("all else at the peak", GIB, None)]
    event = Measured("tensors", 2 * GIB, GIB, parts)
    clock = Clock()
    assert len(lines_at(clock).of(event)) == 1
    lines = EventLines(interval=5.0, clock=clock, stamp=lambda: "", parts=True).of(event)
    assert len(lines) == 2  # what nobody measured is left out
    assert "weights" in lines[1]
    assert "1.00 GiB (plan 1.00 GiB, +0.0%)" in lines[1]


@pytest.mark.parametrize(
    ("whose", "words"),
    [("others", "other programs use 3.00 GiB"), ("ours", "this run has reserved 3.00 GiB")],
)
def test_growth_is_a_warning(whose: str, words: str) -> None:
    (line,) = lines_at(Clock()).of(Grown(99, whose, GIB, 3 * GIB))
    assert "100 warning:" in line
    assert words in line
    assert "1.00 GiB" in line


def test_what_was_done_for_want_of_memory_is_told_when_and_at_the_end() -> None:
    lines = lines_at(Clock())
    why = "CUDA out of memory. Tried to allocate 2 GiB"
    told = lines.of(Eased(99, "slices", "slices are smaller", "loss", why))
    assert told[0].endswith("100 out of memory, loss: slices are smaller")
    assert told[1].endswith(f"   {why}")
    (ahead,) = lines.of(Eased(99, "slices", "slices are smaller"))
    assert ahead.endswith("100 others have grown beyond the margin: slices are smaller")
    end = lines.of(Finished(100, 2.0, 7.0, 9, 9.0, "x", eased=["slices are smaller"]))
    assert len(end) == 2
    assert end[1].endswith("for want of memory: slices are smaller")


def test_the_cap_and_the_trial_are_a_line_each() -> None:
    lines = lines_at(Clock())
    (cap,) = lines.of(Capped(11 * GIB, 64 * 2**20, "rtx3060-12gb"))
    assert "capped at 11.0 GiB, the budget on rtx3060-12gb; 64.0 MiB of its margin spare" in cap
    (tried,) = lines.of(Tried(3.0))
    assert "an update of random text, refresh and all, fits: " in tried


def test_a_continued_run_says_where_it_continues() -> None:
    (line,) = lines_at(Clock()).of(Started(40, 100, 1000, "runs/a", "step-000040"))
    assert "update 41 of 100 from step-000040" in line
    assert "100 updates done" in lines_at(Clock()).of(Finished(100, 2.0, 7.0, 9, 9.0, "x"))[0]


def test_the_start_tells_how_much_each_method_updates() -> None:
    """An unprojected model must not go unnoticed."""
    groups = [Group("attention, mlp", 14, 300_000, "Projected: SVD(rank=4), Adam()")]
    groups += [Group("embedding, head, norm", 7, 100_000, "Dense: Adam()")]
    lines = [line[18:] for line in lines_at(Clock()).of(Assigned(groups))]
    assert lines == [
        "attention, mlp: 14 weights, 300.0 k of 400.0 k elements",
        "  Projected: SVD(rank=4), Adam()",
        "embedding, head, norm: 7 weights, 100.0 k of 400.0 k elements",
        "  Dense: Adam()",
    ]


def test_failed_decompositions_are_told_once_each() -> None:
    lines = lines_at(Clock())
    counts = [0.0, 2.0, 2.0, None, 3.0]
    told = [lines.of(Diagnosed(49, {"energy": 0.5, "kept_bases": count})) for count in counts]
    assert [len(each) for each in told] == [0, 1, 0, 0, 1]
    assert "50 2 decompositions failed so far" in told[1][0]
    assert "3 decompositions" in told[4][0]
    assert lines.of(Diagnosed(59, {"alignment": 0.5})) == []


def test_what_a_conversion_keeps_stands_in_aligned_columns() -> None:
    parts = [
        ConvertedPart("weights", True, 0.0, "fp32, the same values"),
        ConvertedPart("states of 14 weights", False, 0.0123, "rounded once to the new format"),
    ]
    lines = lines_at(Clock()).of(Converted(1000, parts))
    title, head, first, second = (line.removeprefix("12:00:00 ") for line in lines)
    assert title.strip() == "other settings after update 1000:"
    assert head.split() == ["taken", "over", "exact", "error"]
    assert first.split()[1:3] == ["yes", "-"]
    assert second.index("no") == first.index("yes") == head.index("exact")
    assert "1.2e-02  rounded once" in second
    assert first.index("fp32,") == second.index("rounded once")
