"""Tables and streams at the widths of a terminal and of a pipe."""

import errno
import io
import json
import os
from dataclasses import replace

import pytest

from lowmem.cli.console import Console
from lowmem.planner.calibration import Row
from lowmem.planner.plan import PhasePeak, Rates, Speed
from lowmem.train.events import Started, Trained
from lowmem.units import GIB, MIB
from tests.cli.example_plan import example_plan


def printed(monkeypatch: pytest.MonkeyPatch, columns: int | None) -> str:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    Console(out=out).plan(example_plan(), as_result=True)
    return out.getvalue()


@pytest.mark.parametrize("columns", [80, 120, None])
def test_a_plan_shows_choice_parts_alternatives_and_notes(
    monkeypatch: pytest.MonkeyPatch, columns: int | None
) -> None:
    text = printed(monkeypatch, columns)
    assert "22.5 GiB usable" in text
    assert "galore rank 512, 8bit states, bf16 weights, fused+subspace" in text
    assert "20.0 GiB reserved, 19.0 GiB allocated, 18.0 GiB tensors: fits" in text
    assert "in backward of block 7" in text
    weights = next(line for line in text.splitlines() if line.startswith("  weights"))
    assert weights.split() == ["weights", "13.0", "GiB", "72%", "#" * 22]
    assert "presets: context, others, margin, workspace" in text
    assert not any(line.startswith("  workspace") for line in text.splitlines())  # nothing is there
    rows = [
        line.split() for line in text.splitlines() if line.lstrip(" >")[:2] in ("1 ", "2 ", "3 ")
    ]
    assert rows[0][:10] == [
        ">1",
        "galore",
        "512",
        "8bit",
        "bf16",
        "fused+subspace",
        "full",
        "8x16",
        "20.0",
        "GiB",
    ]
    assert rows[1][2] == "64/32"
    assert rows[2][:10] == [
        "3",
        "adam8bit",
        "-",
        "8bit",
        "bf16",
        "fused+subspace",
        "keep",
        "1x16",
        ">26.0",
        "GiB",
    ]
    assert "a higher rank fits" in text
    assert "4.46 GiB too much" in text
    assert "clip off: update is fused" in text


def test_a_plan_says_how_long_it_takes_in_units_of_people() -> None:
    plan = example_plan()
    train = plan.config.train.model_copy(update={"updates": 150_000})
    card = replace(plan.card, rates=Rates("rtx4090", 165.2, 1008, watts=450.0))
    config = plan.config.model_copy(update={"train": train})
    speed = Speed(1703.0, 77.0, {"products": 77.0}, 0.25)
    out = io.StringIO()
    timed = replace(plan, card=card, config=config, speed=speed)
    Console(out=out).plan(timed, as_result=True)
    lines = [line for line in out.getvalue().splitlines() if line.startswith(("Speed", "Time"))]
    assert lines == [
        "Speed   about 1.70 k tokens/s, 77 s per update, by rates of rtx4090"
        " (+-25 %, uncalibrated)",
        "Time    about 4.4 months for 19.7 B tokens in 150000 updates, without evaluation;"
        " 1,444 kWh at the card's 450 W",
    ]
    out.truncate(0)
    Console(out=out).plan(replace(timed, choice=replace(plan.choice, matmul="fp8")), as_result=True)
    assert "(+-25 %, uncalibrated; as with exact products)" in out.getvalue()


def test_a_batch_that_became_smaller_is_the_first_line() -> None:
    plan = example_plan()
    note = "batch 16 sequences instead of 512: sums of gradients do not fit"
    out = io.StringIO()
    Console(out=out).plan(replace(plan, notes=[note, *plan.notes]), as_result=True)
    first, *rest = out.getvalue().splitlines()
    assert first == note
    assert note not in "\n".join(rest)
    assert "  clip off: update is fused" in rest


@pytest.mark.parametrize("verbose", [False, True])
def test_the_peak_of_every_phase_is_shown_when_asked(
    verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    plan = example_plan()
    parts = {"weights": 9 * GIB, "states": 3 * GIB, "loss": GIB, "batch": MIB}
    phases = [PhasePeak("backward", 18 * GIB, {"weights": 18 * GIB}, "backward of block 7")]
    phases += [PhasePeak("loss", 13 * GIB + MIB, parts, "loss, gradient of head")]
    out = io.StringIO()
    memory = replace(plan.memory, phases=phases)
    Console(verbose=verbose, out=out).plan(replace(plan, memory=memory), as_result=True)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    largest = "weights 9.00 GiB, states 3.00 GiB, loss 1.00 GiB"
    assert (f"  loss      13.0 GiB  loss, gradient of head  {largest}" in lines) == verbose
    assert ("Peak by phase" in lines) == verbose


def test_advice_is_shown_before_the_notes() -> None:
    plan = example_plan()
    parts = {"weights": GIB, "states": GIB, "activations": 16 * GIB}
    out = io.StringIO()
    Console(out=out).plan(replace(plan, memory=replace(plan.memory, parts=parts)), as_result=True)
    text = out.getvalue()
    assert "\nAdvice  of the peak activations 89%, states and projections 6%: another" in text
    assert text.index("Advice") < text.index("Not given, so chosen")


def test_without_rates_a_plan_says_why_there_is_no_speed() -> None:
    out = io.StringIO()
    Console(out=out).plan(example_plan(), as_result=True)
    assert "Speed   not estimated: no rates are known for RTX 4090" in out.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
def test_no_penalty_is_printed_without_its_source(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    text = printed(monkeypatch, columns)
    sentence = "-0.049 nats against tuned AdamW (arXiv:2403.03507, Table 3)"
    assert f"Quality {sentence}" in text
    assert f" 1: {sentence}" in text
    assert " 2: +0.013 nats against tuned AdamW (arXiv:2403.03507, Table 3; no evidence for" in text
    head = next(line for line in text.splitlines() if "method" in line).split()
    assert ("nats" in head) == (columns == 120)
    assert text.count("-0.049") == (3 if columns == 120 else 2)


def test_a_plan_names_the_measurement_that_it_used_and_those_that_it_ignored() -> None:
    plan = example_plan()
    card = replace(
        plan.card,
        calibration="cards/a.json of 2026-11-21T13:00:00Z",
        warnings=("cards/b.json was ignored",),
    )
    out = io.StringIO()
    Console(out=out).plan(replace(plan, card=card), as_result=True)
    text = out.getvalue()
    assert "measured: cards/a.json of 2026-11-21T13:00:00Z" in text
    assert "warning: cards/b.json was ignored" in text
    assert "presets: others, margin\n" in text


def test_a_verification_shows_what_is_wrong() -> None:
    out = io.StringIO()
    rows = [
        Row("update", "reserved", 2 * 2**30, 2 * 2**30),
        Row("save", "reserved", 2 * 2**30, 3 * 2**30),
        Row("whole run", "device", 2 * 2**30, None),
    ]
    Console(out=out).verification(rows)
    head, *lines = [line.split() for line in out.getvalue().splitlines()]
    assert head == ["when", "what", "planned", "measured", "error"]
    assert lines[0] == ["update", "reserved", "2.00", "GiB", "2.00", "GiB", "+0.00%"]
    assert lines[1][-2:] == ["+50.00%", "wrong"]
    assert lines[2][-2:] == ["not", "measured"]


def test_no_row_of_the_table_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 120):
        table = printed(monkeypatch, columns).partition("method")[2].partition("Where")[0]
        assert max(len(line) for line in table.splitlines()) <= columns


def test_quiet_keeps_results_and_drops_everything_else() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(quiet=True, out=out, err=err)
    console.say("working")
    console.plan(example_plan(), as_result=False)
    with console.progress() as report:
        report(Started(0, 10, 10, "runs/a"))
    console.result("answer [bold]1[/bold] :smile:")
    assert err.getvalue() == ""
    assert out.getvalue() == "answer [bold]1[/bold] :smile:\n"


def test_a_long_line_is_not_wrapped_in_a_pipe() -> None:
    out = io.StringIO()
    Console(out=out).result("x" * 500)
    assert out.getvalue() == "x" * 500 + "\n"


def test_json_is_parsable_whatever_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    Console(out=out).json(example_plan().to_json())
    assert json.loads(out.getvalue())["peak_bytes"] == 20 * GIB


def test_a_pipe_gets_lines_without_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    err = io.StringIO()
    with Console(err=err).progress(clock=lambda: 0.0) as report:
        report(Started(0, 3, 1000, "runs/a"))
        report(Trained(0, 2.0, 0.01, 1000, 0.5, "gradient", 2.0, 500.0, GIB))
    assert "\x1b" not in err.getvalue()
    assert len(err.getvalue().splitlines()) == 3  # start, heading, update


def test_a_terminal_gets_a_line_per_update_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    err = io.StringIO()
    with Console(err=err).progress() as report:
        report(Started(0, 3, 1000, "runs/a"))
        for update in range(3):
            report(Trained(update, 2.0, 0.01, 1000, 0.5, "gradient", 2.0, 500.0, GIB))
    assert err.getvalue().count("7.3891") == 3  # the perplexity, once an update
    assert "eta" in err.getvalue()
    assert "100%" in err.getvalue()


class Gone(io.StringIO):
    """A pipe or terminal that nobody reads any more."""

    def __init__(self, error: int) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("terminal", ["0", "1"])
def test_a_run_outlives_its_terminal(
    error: int, terminal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal == "1":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    with Console(err=Gone(error)).progress() as report:
        report(Started(0, 3, 1000, "runs/a"))
        report(Trained(0, 2.0, 0.01, 1000, 0.5, "gradient", 2.0, 500.0, GIB))


def test_a_result_that_nobody_reads_ends_the_command() -> None:
    with pytest.raises(BrokenPipeError):
        Console(out=Gone(errno.EPIPE)).result("answer")


def test_a_dumb_terminal_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    err = io.StringIO()
    with Console(err=err).progress(clock=lambda: 0.0) as report:
        report(Started(0, 3, 1000, "runs/a"))
    assert "\x1b[2K" not in err.getvalue()
