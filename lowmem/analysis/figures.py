"""Curves of runs as numbers, before anything draws them.

    figure = losses(runs, "tokens", "perplexity", window=None)
    figure.curves[0].line, figure.marks, figure.x.ticks(6)

`svg.py`, `terminal.py` and `image.py` draw the same `Figure`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lowmem.analysis.axes import Axis
from lowmem.analysis.history import History
from lowmem.analysis.published import published_beside, why_none
from lowmem.errors import ConfigError, nearest
from lowmem.train.events import Trained, perplexity
from lowmem.units import GIB, MIB

X = Literal["tokens", "time", "memory", "update"]
Y = Literal["loss", "perplexity"]
XS: tuple[X, ...] = ("tokens", "time", "memory", "update")
YS: tuple[Y, ...] = ("loss", "perplexity")
Points = list[tuple[float, float]]

_WIDE_X, _WIDE_Y = 20.0, 6.0  # ratios of the largest to the smallest value that ask for logarithms
_SMOOTH = 25  # a run is smoothed over one part in so many of its updates


@dataclass(frozen=True)
class Curve:
    """line: what is drawn through, smoothed. raw: the same unsmoothed. points: evaluations."""

    name: str
    line: Points
    raw: Points = field(default_factory=list)
    points: Points = field(default_factory=list)

    def everything(self) -> Points:
        return [*self.line, *self.points]


@dataclass(frozen=True)
class Mark:
    """A published result."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Figure:
    """Curves and marks with their axes; notes say how they came about."""

    x: Axis
    y: Axis
    curves: list[Curve]
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def losses(runs: Sequence[History], x: str, y: str, window: int | None) -> Figure:
    """Loss or perplexity of runs. ConfigError: unknown x or y.

    window: updates over which the training loss is smoothed, None for a 25th of a run.
    """
    _require("--x", x, XS)
    _require("--y", y, YS)
    value = perplexity if y == "perplexity" else float
    marks, notes = _marks(runs, value) if x == "tokens" else ([], [])
    most = max((run.trained[-1].tokens for run in runs if run.trained), default=1)
    far = bool(marks) and max(mark.x for mark in marks) > _WIDE_X * most
    unit, what = (1, "tokens") if far else _unit(runs, x)
    marks = [Mark(mark.name, mark.x / unit, mark.y) for mark in marks]
    names = _names(runs)
    curves = [
        _of_memory(name, run, unit, value)
        if x == "memory"
        else _curve(name, run, x, unit, value, window or smoothing(run))
        for name, run in zip(names, runs, strict=True)
    ]
    if x == "memory":
        notes.insert(0, "a point is the last validation of a run at its peak memory")
    else:
        notes.insert(0, f"lines: training loss, {_over(runs, window)}; points: validation")
    if x == "time":
        notes.append("time of the updates alone, without evaluation, saving and loading")
    return _figure(curves, marks, notes, what, y, far=far)


def series(run: History, label: str, of: Callable[[Trained], float]) -> Figure:
    """One number of every update against tokens, as it is."""
    unit, what = _unit([run], "tokens")
    points = [(each.tokens / unit, of(each)) for each in run.trained]
    return _figure([Curve(run.name, points)], [], [], what, label)


def _over(runs: Sequence[History], window: int | None) -> str:
    over = sorted({window or smoothing(run) for run in runs})
    if over[-1] == 1:
        return "not smoothed"
    words = str(over[0]) if over[0] == over[-1] else f"{over[0]} to {over[-1]}"
    return f"exponential mean over {words} updates"


def smoothing(run: History) -> int:
    """Updates over which a run is smoothed where nobody says."""
    return max(1, len(run.trained) // _SMOOTH)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Exponential means as slow as a mean of `window` values; what is not finite is left out.

    Each is the weighted mean of all values so far, so the first is the first value.
    """
    keep, total, weight = 1 - 2 / (window + 1), 0.0, 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means


def thinned(points: Points, most: int) -> Points:
    """At most about so many of the points, the first and the last among them."""
    if len(points) <= most:
        return points
    step = (len(points) - 1) / (most - 1)
    return [points[round(n * step)] for n in range(most)]


def _require(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"{flag} {value} must be one of {', '.join(known)}",
            nearest(value, known),
            f"{flag} {known[0]}",
        )


def _unit(runs: Sequence[History], x: str) -> tuple[float, str]:
    """(what x is divided by, the words of its axis)."""
    last = [run.trained[-1] for run in runs if run.trained]
    match x:
        case "tokens":
            most = max((each.tokens for each in last), default=1)
            for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
                if most >= unit:
                    return unit, f"tokens, {name}"
            return 1, "tokens"
        case "time":
            seconds = max((run.seconds for run in runs), default=1.0)
            for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
                if seconds >= 2 * unit:
                    return unit, f"training time, {name}"
            return 1, "training time, seconds"
        case "memory":
            peaks = [run.peak for run in runs if run.peak is not None]
            kinds = " and ".join(sorted({peak.what for peak in peaks}))
            if max((peak.bytes for peak in peaks), default=0) >= GIB:
                return GIB, f"peak memory ({kinds}), GiB"
            return MIB, f"peak memory ({kinds}), MiB"
    return 1, "updates"


def _names(runs: Sequence[History]) -> list[str]:
    """The names of the folders; where they repeat, their paths."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _curve(
    name: str, run: History, x: str, unit: float, value: Callable[[float], float], window: int
) -> Curve:
    """The training loss of a run, and its evaluations where their updates stand."""
    elapsed = run.elapsed()
    places = {
        each.update: {"tokens": each.tokens, "time": seconds, "update": each.update + 1}[x] / unit
        for each, seconds in zip(run.trained, elapsed, strict=True)
    }
    at = [places[each.update] for each in run.trained]
    raw = [each.loss for each in run.trained]
    line = smoothed(raw, window)
    return Curve(
        name,
        [(place, value(y)) for place, y in zip(at, line, strict=True)],
        [(place, value(y)) for place, y in zip(at, raw, strict=True)] if window > 1 else [],
        [(places[e.update], value(e.eval_loss)) for e in run.evaluated if e.update in places],
    )


def _of_memory(name: str, run: History, unit: float, value: Callable[[float], float]) -> Curve:
    """One point, none where memory or validation is not known."""
    if run.peak is None or run.final is None:
        return Curve(name, [])
    return Curve(name, [], [], [(run.peak.bytes / unit, value(run.final.eval_loss))])


def _marks(
    runs: Sequence[History], value: Callable[[float], float]
) -> tuple[list[Mark], list[str]]:
    """What is published of these runs' methods, x in tokens; and why nothing is."""
    found: dict[str, Mark] = {}
    for run in runs:
        for row in published_beside(run):
            if row.tokens is None:
                continue
            rank = "" if row.rank is None else f", rank {row.rank:g} of the width"
            results = {f"tuned adamw: {row.tuned}": row.tuned}
            if row.method == run.config.optimizer.method:
                results[f"{row.method}{rank}: {row.ppl} ({row.source})"] = row.ppl
            for name, ppl in results.items():
                if ppl is not None:
                    found[name] = Mark(name, row.tokens, value(math.log(ppl)))
    note = "published points: by the papers' evaluation, which is too low; tokens with padding"
    return list(found.values()), [note if found else why_none(runs[0])]


def _figure(
    curves: list[Curve],
    marks: list[Mark],
    notes: list[str],
    x_label: str,
    y_label: str,
    *,
    far: bool = False,
) -> Figure:
    """With axes that hold everything; far: the marks lie far beyond the curves."""
    points = [point for curve in curves for point in curve.everything()]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    xs += [mark.x for mark in marks]
    ys += [mark.y for mark in marks]
    if not far and not x_label.startswith("peak"):
        xs.append(0.0)  # what is counted begins at nothing
    positive = [y for y in ys if y > 0 and math.isfinite(y)] or [1.0]
    steep = y_label == "perplexity" and max(positive) > _WIDE_Y * min(positive)
    sides = 0.1 if x_label.startswith("peak") else 0.02
    return Figure(
        Axis.over(x_label, xs, log=far, room=sides),
        Axis.over(y_label, ys, log=steep, room=0.05),
        curves,
        marks,
        notes,
    )
