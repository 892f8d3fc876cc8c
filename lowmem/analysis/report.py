"""A run as one HTML page that needs nothing else: `report.html` in its folder.

    write_report(Path("runs/llama-60m-galore-1"))

No script, no font, no picture comes from elsewhere, and its policy forbids them; curves are inline
SVG. Everything that was read is escaped; paths, host, user and secrets are taken out.
"""

import shlex
import time
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from lowmem import __version__
from lowmem.analysis import markup
from lowmem.analysis.figures import Figure, losses, series
from lowmem.analysis.history import History
from lowmem.analysis.published import published_beside
from lowmem.analysis.report_events import events_section, methods_section
from lowmem.analysis.report_memory import memory_section
from lowmem.analysis.style import STYLE
from lowmem.analysis.svg import drawn
from lowmem.config.presets import resolve_model
from lowmem.config.toml import to_toml
from lowmem.data.cache import write_whole
from lowmem.errors import CheckpointError
from lowmem.planner.quality import Evidence
from lowmem.private import without_private
from lowmem.train.events import Trained, perplexity
from lowmem.units import format_bytes, format_count, format_seconds

NAME = "report.html"


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
        memory_section(run),
        _published(run),
        events_section(run),
        methods_section(run),
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
    return f'<dl class="cards">{inside}</dl>{markup.notes(run.warnings)}'


def _verdict(run: History) -> str:
    """What `lowmem reproduce` found."""
    told = run.verdict
    if told is None:
        return ""
    rows = [
        [key.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else markup.plain(value)]
        for key, value in told.items()
        if key != "deviations"
    ]
    deviations = told.get("deviations")
    listed = [markup.plain(each) for each in deviations] if isinstance(deviations, list) else []
    body = markup.table([], rows)
    if listed:
        body += f"<h3>Deviations from the publication</h3>{markup.bullets(listed)}"
    return markup.section("Verdict", body)


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
    return markup.section("Curves", f'<div class="figures">{body}</div>{markup.notes(notes)}')


_SERIES: list[tuple[str, Callable[[Trained], float]]] = [
    ("learning rate", lambda each: each.lr),
    ("norm of the gradient", lambda each: each.grad_norm),
    ("tokens per second", lambda each: each.tokens_per_second),
]


def _key(figure: Figure) -> str:
    """What the published marks of a figure are."""
    names = [escape(mark.name) for mark in figure.marks]
    return f"<figcaption>published: {'; '.join(names)}</figcaption>" if names else ""


def _published(run: History) -> str:
    """Published results beside the run: those of its method, the others folded."""
    rows = sorted(published_beside(run), key=lambda row: row.ppl)
    mine = [row for row in rows if row.method == run.config.optimizer.method]
    if not rows:
        return ""
    body = _results(mine) if mine else markup.notes(["Nothing is published of this method."])
    body += markup.folded(f"all {len(rows)} of this model", _results(rows))
    return markup.section("Published", body)


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
    return markup.table(["method", "perplexity", "source"], cells)


def _configuration(run: History) -> str:
    text = escape(without_private(to_toml(run.config)))
    body = markup.folded("config.toml", f"<pre>{text}</pre>")
    if run.plan is not None and run.plan.notes:
        body += markup.folded("not given, so chosen", markup.bullets(run.plan.notes))
    return markup.section("Configuration", body)


def _environment(run: History) -> str:
    known = {key: value for key, value in run.environment.items() if value is not None}
    command = known.pop("command", None)
    rows = [[str(key), markup.plain(value)] for key, value in known.items()]
    if isinstance(command, list):
        # Word by word: what is joined looks like one path with spaces in it.
        words = without_private(["lowmem", *map(str, command)])
        rows.append(["command", shlex.join(words)])
    return markup.section("Environment", markup.table([], rows)) if rows else ""
