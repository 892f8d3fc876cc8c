"""A run as one HTML page that needs nothing else: `report.html` in its folder.

    write_report(Path("runs/llama-60m-galore-1"))

No script, no font, no picture comes from elsewhere, and its policy forbids them; curves are inline
SVG. Everything that was read is escaped; paths, host, user and secrets are taken out.
"""

import json
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lowmem import __version__
from lowmem.analysis.figures import Figure, losses, series
from lowmem.analysis.history import History
from lowmem.analysis.published import published_beside
from lowmem.analysis.style import STYLE
from lowmem.analysis.svg import drawn
from lowmem.config.presets import resolve_model
from lowmem.config.toml import to_toml
from lowmem.data.cache import write_whole
from lowmem.errors import CheckpointError
from lowmem.planner.plan import Plan
from lowmem.planner.quality import Evidence
from lowmem.private import without_private
from lowmem.train.events import Measured, Trained, perplexity
from lowmem.units import format_bytes, format_count, format_seconds

NAME = "report.html"
_MOST_EVENTS = 200  # the newest


def write_report(folder: Path) -> Path:
    """Write the page of a run, at any time of its life. CheckpointError: no run, not writable."""
    run = History.read(folder)
    path = run.folder / NAME
    try:
        write_whole(path, page(run).encode("utf-8", errors="replace"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}",
            "the page belongs into the folder of its run",
            "change the folder's owner or permissions",
        ) from None
    return path


def page(run: History) -> str:
    """The whole document."""
    name = escape(run.name)
    sections = [
        _verdict(run),
        _figures_of(run),
        _memory(run),
        _published(run),
        _events(run),
        _methods(run),
        _configuration(run),
        _environment(run),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name} - lowmem</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{_pills(run)}</p>
<p class="quiet">{escape(_subtitle(run))}</p>
</header>
<main>
{_summary(run)}
{"".join(sections)}
</main>
<footer class="quiet">lowmem {__version__}, written {time.strftime("%Y-%m-%d %H:%M")}</footer>
</body>
</html>
"""


def _subtitle(run: History) -> str:
    config = run.config
    model = resolve_model(config.model, run.folder)
    source = without_private(config.data.source)
    return (
        f"{format_count(model.parameters)} weights, {config.optimizer.method}, "
        f"{source}, protocol {config.data.protocol}, seed {config.train.seed}"
    )


def _pills(run: History) -> str:
    stands = "" if run.status == "finished" else f", {run.done:,} of {run.updates:,} updates"
    pills: list[tuple[str, str]] = [(run.status + stands, run.status)]
    if run.verdict is not None:
        told = str(run.verdict.get("verdict", "?"))
        kind = "finished" if told == "match" else "unfinished"
        pills.append((f"reproduction: {told}", kind))
    return " ".join(f'<span class="pill {kind}">{escape(text)}</span>' for text, kind in pills)


def _summary(run: History) -> str:
    """The few numbers that most people want."""
    cells: list[tuple[str, str, str]] = []
    if run.final is not None and run.perplexity is not None:
        after = format_count(run.tokens_at(run.final.update))
        cells.append(("perplexity", f"{run.perplexity:.5g}", f"validation after {after} tokens"))
        if run.published_perplexity is not None:
            words = "by the papers' evaluation, which is too low"
            cells.append(("as published", f"{run.published_perplexity:.5g}", words))
        cells.append(("loss", f"{run.final.eval_loss:.4f}", "nats per token"))
    if run.trained:
        last = run.trained[-1]
        speed = last.tokens / run.seconds if run.seconds else 0.0
        cells.append(("tokens", format_count(last.tokens), f"in {run.done:,} updates"))
        cells.append(("time", format_seconds(run.seconds), f"{format_count(speed)} tokens/s"))
    if run.peak is not None:
        what = {"tensors": "in tensors", "allocated": "allocated", "process": "of the process"}
        words = what.get(run.peak.what, run.peak.what)
        cells.append(("peak memory", format_bytes(run.peak.bytes), words))
    unigram = (run.finished or {}).get("unigram_loss")
    if isinstance(unigram, float):
        words = "knows only how frequent each token is"
        cells.append(("unigram model", f"{perplexity(unigram):.5g}", words))
    if not run.trained:
        return '<p class="note">Nothing has been trained yet.</p>'
    inside = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        f'<dd class="quiet">{escape(more)}</dd></div>'
        for name, value, more in cells
    )
    return f'<dl class="cards">{inside}</dl>{_notes(run.warnings)}'


def _verdict(run: History) -> str:
    """What `lowmem reproduce` found."""
    told = run.verdict
    if told is None:
        return ""
    rows = [
        [key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else _plain(value)]
        for key, value in told.items()
        if key != "deviations"
    ]
    deviations = told.get("deviations")
    listed = [_plain(each) for each in deviations] if isinstance(deviations, list) else []
    body = _table([], rows)
    if listed:
        body += f"<h3>Deviations from the publication</h3>{_list(listed)}"
    return _section("Verdict", body)


def _figures_of(run: History) -> str:
    if not run.trained:
        return ""
    figures = [
        losses([run], "tokens", "perplexity", None),
        losses([run], "tokens", "loss", None),
        losses([run], "time", "perplexity", None),
        *(series(run, label, of) for label, of in _SERIES),
    ]
    notes = dict.fromkeys(note for figure in figures for note in figure.notes)
    body = "".join(f"<figure>{drawn(figure)}{_key(figure)}</figure>" for figure in figures)
    return _section("Curves", f'<div class="figures">{body}</div>{_notes(notes)}')


_SERIES: list[tuple[str, Callable[[Trained], float]]] = [
    ("learning rate", lambda each: each.lr),
    ("norm of the gradient", lambda each: each.grad_norm),
    ("tokens per second", lambda each: each.tokens_per_second),
]


def _key(figure: Figure) -> str:
    """What the published marks of a figure are."""
    names = [escape(mark.name) for mark in figure.marks]
    return f"<figcaption>published: {'; '.join(names)}</figcaption>" if names else ""


def _memory(run: History) -> str:
    """Plan against measured, as far as they are known."""
    plan, measured = run.plan, run.measured
    body = "" if plan is None else _table([], _planned(run, plan))
    if plan is None and (run.folder / "plan.json").is_file():
        body = _notes(["plan.json is damaged or of another version of lowmem."])
    if measured is not None:
        body += _measured_parts(measured) + _notes([_about(plan, measured)])
    elif body:
        body += _notes(["The peak of the first update was not measured."])
    return _section("Memory: plan against measured", body) if body else ""


def _planned(run: History, plan: Plan) -> list[list[str]]:
    rows = [
        ["settings", plan.choice.sentence()],
        ["card", f"{plan.card.name}: {format_bytes(plan.card.usable_bytes)} usable"],
        ["planned peak", f"{format_bytes(plan.memory.reserved)} reserved"],
    ]
    if plan.speed is not None and run.trained:
        speed = run.trained[-1].tokens / run.seconds if run.seconds else 0.0
        planned = format_count(plan.speed.tokens_per_second)
        rows.append(["tokens/s", f"{planned} estimated, {format_count(speed)} measured"])
    return rows


def _measured_parts(measured: Measured) -> str:
    """A row for every part of the first update's peak, with a bar of its share."""
    whole = max(1, measured.planned, measured.measured)
    rows = []
    parts = [(part.name, part.planned, part.measured) for part in measured.parts]
    for name, planned, seen in [*parts, ("peak", measured.planned, measured.measured)]:
        if seen is None:
            told, error = "not measured", ""
        else:
            told = format_bytes(seen)
            error = f"{seen / planned - 1:+.1%}" if planned else "-"
        bars = "".join(
            f'<i class="{kind}" style="width:{100 * (size or 0) / whole:.1f}%"></i>'
            for kind, size in (("planned", planned), ("seen", seen))
        )
        cells = [format_bytes(planned), told, error]
        told_cells = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        bar = f'<span class="bar">{bars}</span>'
        rows.append(f"<tr><th>{escape(name)}{bar}</th>{told_cells}</tr>")
    head = (
        '<tr><th></th><th class="number">planned</th><th class="number">measured</th><th></th></tr>'
    )
    return f'<table class="parts"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _about(plan: Plan | None, measured: Measured) -> str:
    kinds = {
        "tensors": "bytes of live tensors",
        "reserved": "what the allocator has reserved; parts are of what it has allocated",
    }
    worst = "" if plan is None else f" Worst moment planned: {plan.memory.instant}."
    return (
        f"First update; {kinds.get(measured.what, measured.what)}. "
        f"Bars: planned above, measured below.{worst}"
    )


def _published(run: History) -> str:
    """Published results beside the run: those of its method, the others folded."""
    rows = sorted(published_beside(run), key=lambda row: row.ppl)
    mine = [row for row in rows if row.method == run.config.optimizer.method]
    if not rows:
        return ""
    body = _results(mine) if mine else _notes(["Nothing is published of this method."])
    body += f"<details><summary>all {len(rows)} of this model</summary>{_results(rows)}</details>"
    return _section("Published", body)


def _results(rows: Iterable[Evidence]) -> str:
    cells = [
        [
            row.method
            + ("" if row.rank is None else f", rank {row.rank:g} of the width")
            + ("" if row.updates is None else f", {row.updates:,} updates"),
            f"{row.ppl:g}",
            f"{row.source} ({row.mark})",
        ]
        for row in rows
    ]
    return _table(["method", "perplexity", "source"], cells)


def _events(run: History) -> str:
    """What happened, the newest last; saves are told in one line."""
    told = [(_at(event), *_event(event)) for event in run.events]
    saves = [event for event in run.events if event.get("event") == "saved"]
    rows = [[at, what, words] for at, what, words in told if what not in ("saved", "assigned")]
    shown = rows[-_MOST_EVENTS:]
    body = _table(["update", "event", ""], shown)
    notes = []
    if len(shown) < len(rows):
        notes.append(f"{len(rows) - len(shown)} earlier ones are in events.jsonl.")
    if saves:
        newest = _number(saves[-1], "bytes")
        seconds = sum(_number(event, "blocked") for event in saves)
        notes.append(
            f"{len(saves)} checkpoints were saved, the last of {format_bytes(newest)}; "
            f"training waited {format_seconds(seconds)} for them."
        )
    return _section("Events", body + _notes(notes)) if run.events else ""


def _at(event: dict[str, Any]) -> str:
    """Updates done, where an event tells it."""
    update = event.get("update")
    counts_from_0 = event.get("event") in ("skipped", "grown")
    return "" if not isinstance(update, int) else str(update + counts_from_0)


def _number(event: dict[str, Any], key: str) -> float:
    value = event.get(key)
    return value if isinstance(value, int | float) else 0


def _event(event: dict[str, Any]) -> tuple[str, str]:
    """(what it is, in words) of one event; one that is not known is shown as it is."""
    what = str(event.get("event", "?"))
    match what:
        case "started":
            again = event.get("resumed_from")
            words = f"{event.get('updates')} updates of {event.get('tokens_per_update')} tokens"
            words += f", from {Path(str(again)).name}" if again else ""
        case "storage":
            words = f"checkpoints of {format_bytes(_number(event, 'checkpoint'))}"
            words += f", {format_bytes(_number(event, 'free'))} free"
        case "measured" | "grown":
            planned, seen = (format_bytes(_number(event, key)) for key in ("planned", "measured"))
            words = f"{seen} measured, {planned} planned"
            words += f", of {event['whose']}" if "whose" in event else ""
        case "skipped":
            sequences = event.get("sequences")
            count = len(sequences) if isinstance(sequences, list) else 0
            made = "made all the same" if event.get("made") else "not made"
            words = f"{_plain(event.get('why'))}; {made}, {count} sequences"
        case "rolledback":
            words = f"{_plain(event.get('why'))}; batches {event.get('first')} to "
            words += f"{event.get('last')} are left out, {event.get('number')} of {event.get('of')}"
        case "finished":
            words = f"loss {_number(event, 'eval_loss'):.4f}"
            words += f", {format_seconds(_number(event, 'seconds'))}"
        case "continued":
            words = f"after {format_seconds(_number(event, 'seconds'))}"
        case _:
            rest = {k: v for k, v in event.items() if k not in ("event", "update")}
            words = ", ".join(f"{key}: {_plain(value)}" for key, value in rest.items())
    return what, without_private(words)


def _methods(run: History) -> str:
    """Which weights have which method."""
    assigned = [event for event in run.events if event.get("event") == "assigned"]
    groups = assigned[-1].get("groups") if assigned else None
    rows = [
        [_plain(each.get("roles")), f"{_number(each, 'elements'):,.0f}", _plain(each.get("method"))]
        for each in (groups if isinstance(groups, list) else [])
        if isinstance(each, dict)
    ]
    return _section("Method", _table(["weights", "elements", "updated by"], rows)) if rows else ""


def _configuration(run: History) -> str:
    text = escape(without_private(to_toml(run.config)))
    body = f"<details><summary>config.toml</summary><pre>{text}</pre></details>"
    if run.plan is not None and run.plan.notes:
        body += f"<details><summary>not given, so chosen</summary>{_list(run.plan.notes)}</details>"
    return _section("Configuration", body)


def _environment(run: History) -> str:
    known = {key: value for key, value in run.environment.items() if value is not None}
    command = known.pop("command", None)
    rows = [[str(key), _plain(value)] for key, value in known.items()]
    if isinstance(command, list):
        # Word by word: what is joined looks like one path with spaces in it.
        words = without_private(["lowmem", *map(str, command)])
        rows.append(["command", shlex.join(words)])
    return _section("Environment", _table([], rows)) if rows else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text; the first of a row without a head is its name."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = []
    for row in rows:
        first, *others = (escape(cell) for cell in row)
        name = f"<td>{first}</td>" if head else f"<th>{first}</th>"
        body.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    heading = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<table>{heading}<tbody>{''.join(body)}</tbody></table>"


def _list(items: Iterable[str]) -> str:
    cleaned = (escape(without_private(item)) for item in items)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in cleaned)}</ul>"


def _notes(lines: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines if line)


def _plain(value: Any) -> str:
    """A value of a file as text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return str(without_private(text))
