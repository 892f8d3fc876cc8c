"""What a person sees: tables, the plan, and the progress of a run; the only user of rich.

    console = Console(quiet=False)
    console.plan(plan)                       # stdout: a result
    with console.progress(updates) as report:
        train(run, corpus, report)           # stderr: one line per update

Results go to stdout, everything that happens on the way to stderr. Without a terminal there is no
bar and no colour: lines with a time stamp, at most one update in five seconds.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import rich.console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from lowmem.cli.lines import EventLines
from lowmem.planner.calibration import Row
from lowmem.planner.plan import Candidate, Plan, Rank
from lowmem.planner.speed import why_no_estimate
from lowmem.train.events import Event, Report, Started, Trained
from lowmem.units import format_bytes, format_count, format_span

_PIPE_WIDTH = 120  # tables in a pipe or file, unless COLUMNS says


class Console:
    """stdout for results and stderr for what happens; quiet silences it, verbose adds detail."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._out = _rich(out, stderr=False)
        self._err = _rich(err, stderr=True)

    @property
    def width(self) -> int:
        """Characters in a line of stdout."""
        return self._out.width

    def say(self, line: str) -> None:
        """A line about what is going on."""
        if not self.quiet:
            self._err.print(line, soft_wrap=True)

    def result(self, line: str) -> None:
        """A line of the answer."""
        self._out.print(line, soft_wrap=True)

    def json(self, value: Any) -> None:
        """The answer for programs."""
        self._out.file.write(json.dumps(value, indent=2) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, gap: int = 2) -> None:
        """Aligned columns on stdout, `gap` blanks apart; those named ">x" to the right."""
        self._out.print(_table(columns, rows, gap))

    def plan(self, plan: Plan, *, as_result: bool) -> None:
        """The choice, where its memory goes, the alternatives and what nobody gave."""
        target = self._out if as_result else self._err
        if self.quiet and not as_result:
            return
        for line in [*plan.departures, *_card_lines(plan)]:
            target.print(line, soft_wrap=True)
        target.print()
        wide = target.width >= 120
        target.print(_candidate_table(plan, wide=wide))
        for line in _reasons(plan, wide=wide):
            target.print(line)
        target.print()
        target.print(
            f"Where the {format_bytes(plan.memory.tensors)} of tensors go, {plan.memory.instant}"
        )
        target.print(_parts_table(plan))
        if self.verbose and plan.memory.phases:
            target.print("\nPeak by phase")
            target.print(_phases_table(plan))
        for sentence in plan.advice:
            target.print(f"\nAdvice  {sentence}", soft_wrap=True)
        notes = [note for note in plan.notes if note not in plan.departures]
        target.print("\nNot given, so chosen" if notes else "")
        for note in notes:
            target.print(f"  {note}")

    def verification(self, rows: Sequence[Row]) -> None:
        """What was planned and what was measured, on stdout."""
        cells = [
            [
                row.segment,
                row.what,
                format_bytes(row.planned),
                "not measured" if row.measured is None else format_bytes(row.measured),
                "" if row.error is None else f"{row.error:+.2%}",
                "" if row.is_right else "wrong",
            ]
            for row in rows
        ]
        self.table(["when", "what", ">planned", ">measured", ">error", ""], cells)

    @contextmanager
    def progress(self, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
        """A report function that shows a run; a terminal also gets a bar below the lines."""
        if self.quiet:
            yield lambda event: None
        elif self._err.is_terminal and not self._err.is_dumb_terminal:
            yield from self._live()
        else:
            lines = EventLines(
                interval=5.0,
                clock=clock,
                stamp=lambda: time.strftime("%H:%M:%S "),
                parts=self.verbose,
            )
            yield lambda event: self._lines(lines.of(event))

    @contextmanager
    def work(self, what: str) -> Iterator[Callable[[float, float, str], None]]:
        """Progress of something that is no run: report(done, total, words)."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._err,
            transient=True,
            disable=self.quiet or not self._err.is_terminal,
        )
        with bar:
            task = bar.add_task(what, words="")
            yield lambda done, total, words: bar.update(
                task, completed=done, total=total, words=words
            )

    def _lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._err.print(line, soft_wrap=True)

    def _live(self) -> Iterator[Report]:
        lines = EventLines(interval=0.0, clock=time.monotonic, stamp=lambda: "", parts=self.verbose)
        bar = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._err,
            transient=True,
        )
        with bar:
            task = bar.add_task("", words="", total=None)

            def report(event: Event) -> None:
                self._lines(lines.of(event))
                if isinstance(event, Started):
                    bar.update(task, total=event.updates, completed=event.update)
                elif isinstance(event, Trained):
                    words = f"eta {lines.remaining()}"
                    bar.update(task, completed=event.update + 1, words=words)

            yield report


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """The reader has gone: `cli/main.py` ends the command. rich would end it with 1, a bug."""
        raise BrokenPipeError


class _Lasting:
    """stderr for what must outlive its reader: what a pipe, terminal or disk refuses is lost."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _rich(file: TextIO | None, *, stderr: bool) -> rich.console.Console:
    lasting = cast(TextIO, _Lasting(file or sys.stderr)) if stderr else file
    # Markup and highlighting would read brackets and numbers in paths and messages.
    console = _Console(file=lasting, stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], gap: int = 2) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        header_style="bold",
        show_header=any(name.lstrip(">") for name in columns),
    )
    for index, name in enumerate(columns):
        table.add_column(
            name.lstrip(">"),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
            no_wrap=index == 0 and len(columns) > 1,  # what a row is called must be readable
        )
    for row in rows:
        table.add_row(*row)
    return table


def _card_lines(plan: Plan) -> list[str]:
    card, memory = plan.card, plan.memory
    verdict = "fits" if plan.fits else "does not fit"
    return [
        f"Card    {card.name} ({card.source}): {format_bytes(card.usable_bytes)} usable",
        f"        = {format_bytes(card.total)} - context {format_bytes(card.context)}"
        f" - others {format_bytes(card.others)} - margin {format_bytes(card.margin)}",
        f"        presets: {', '.join(card.presets)}",
        *([f"        measured: {card.calibration}"] if card.calibration else []),
        *(f"        warning: {warning}" for warning in card.warnings),
        f"Choice  {plan.choice.sentence()}",
        *([f"Quality {plan.quality.sentence()}"] if plan.quality else []),
        f"Peak    {format_bytes(memory.reserved)} reserved,"
        f" {format_bytes(memory.allocated)} allocated,"
        f" {format_bytes(memory.tensors)} tensors: {verdict}",
        *_device_line(plan),
        *_host_lines(plan),
        *_speed_lines(plan),
        f"Disk    {format_bytes(plan.checkpoint_bytes)} for each checkpoint",
    ]


def _host_lines(plan: Plan) -> list[str]:
    if not plan.memory.host:
        return []
    what = ", ".join(name for name, where in plan.choice.away() if where == "host")
    return [f"Host    {format_bytes(plan.memory.host)} of host memory, pinned: {what}"]


def _speed_lines(plan: Plan) -> list[str]:
    speed, rates, seconds = plan.speed, plan.card.rates, plan.training_seconds
    if speed is None or rates is None or seconds is None:
        return [f"Speed   not estimated: {why_no_estimate(plan.card, plan.choice.weights)}"]
    tokens = seconds * speed.tokens_per_second
    basis = "measured rates" if rates.measured else "uncalibrated"
    basis += "" if plan.choice.matmul == "exact" else "; as with exact products"
    return [
        f"Speed   about {format_count(speed.tokens_per_second)} tokens/s,"
        f" {format_span(speed.seconds_per_update)} per update, by rates of {rates.card}"
        f" (+-{100 * speed.error:.0f} %, {basis})",
        f"Time    about {format_span(seconds)} for {format_count(tokens)} tokens"
        f" in {plan.config.train.updates} updates, without evaluation{_energy(plan)}",
    ]


def _device_line(plan: Plan) -> list[str]:
    if plan.card.kind == "cpu":
        return []
    used, total = format_bytes(plan.device_bytes), format_bytes(plan.card.total)
    return [f"        {used} of the card's {total} in use, with context and others"]


def _energy(plan: Plan) -> str:
    rates = plan.card.rates
    if plan.training_kwh is None or rates is None:
        return ""
    used = plan.training_kwh
    energy = f"{used:.2g}" if used < 10 else f"{used:,.0f}"
    return f"; {energy} kWh at the card's {rates.watts:g} W"


_COLUMNS = ["", "method", ">rank", "states", "weights", "update", "recompute", ">micro", ">peak"]


def _candidate_table(plan: Plan, *, wide: bool) -> Table:
    rows = []
    for number, candidate in enumerate(plan.candidates, start=1):
        choice = candidate.choice
        rank = rank_in_words(choice.rank)
        micro = f"{choice.micro_batch}x{choice.accumulate}"
        peak = (">" if candidate.bound else "") + format_bytes(candidate.peak_bytes)
        row = [_mark(plan, candidate, number), choice.method, rank, choice.states, choice.weights]
        row += [choice.update, choice.recompute, micro, peak]
        nats = f"{candidate.quality.nats:+.3f}" if candidate.quality else ""
        rows.append([*row, nats, candidate.reason] if wide else row)
    columns = [*_COLUMNS, ">nats", "why not"] if wide else _COLUMNS
    return _table(columns, rows, gap=2 if wide else 1)


def _mark(plan: Plan, candidate: Candidate, number: int) -> str:
    return f">{number}" if candidate.choice == plan.choice else f" {number}"


def rank_in_words(rank: Rank) -> str:
    """A rank in a column of a table."""
    if isinstance(rank, dict):
        return "/".join(str(value) for value in rank.values())
    return "-" if rank is None else str(rank)


def _reasons(plan: Plan, *, wide: bool) -> list[str]:
    """What no column has room for: where penalties are from, and narrow also the reasons."""
    lines = []
    for number, candidate in enumerate(plan.candidates, start=1):
        if candidate.reason and not wide:
            lines.append(f"{number:2}: {candidate.reason}")
        if candidate.quality:
            lines.append(f"{number:2}: {candidate.quality.sentence()}")
    return lines


def _parts_table(plan: Plan) -> Table:
    total = max(1, plan.memory.tensors)
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    rows = [
        [f"  {name}", format_bytes(size), f"{size / total:.0%}", "#" * round(30 * size / total)]
        for name, size in parts
        if size
    ]
    return _table(["", ">", ">", ""], rows)


_LARGEST = 3


def _phases_table(plan: Plan) -> Table:
    """The worst moment of every kind of phase, the highest first, with its largest parts."""
    rows = []
    for peak in plan.memory.phases:
        largest = sorted(peak.parts.items(), key=lambda part: -part[1])[:_LARGEST]
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
        rows.append([f"  {peak.phase}", format_bytes(peak.tensors), peak.instant, parts])
    return _table(["", ">tensors", "when", "largest parts"], rows)
