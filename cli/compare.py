"""`lowmem compare`: runs side by side, and whether that is fair."""

from pathlib import Path

from lowmem.analysis.compare import Comparison, Setting, compared
from lowmem.analysis.history import read_all
from lowmem.analysis.seeds import HOW, Interval
from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.units import format_bytes, format_count, format_seconds


def compare(given: Given, folders: list[Path], *, as_json: bool) -> None:
    """Print the table, or its JSON."""
    console = Console(quiet=given.quiet)
    comparison = compared(read_all(folders))
    if as_json:
        console.json(comparison.to_json())
    else:
        show(comparison, console)


def show(comparison: Comparison, console: Console) -> None:
    """The table, what is published beside it, and what makes it unfair."""
    for difference in comparison.differences:
        console.result(f"not comparable: {difference.sentence()}")
    settings = comparison.settings
    keys = list(dict.fromkeys(key for each in settings for key in each.label))
    keys = [key for key in keys if any(each.label.get(key, "-") != "-" for each in settings)]
    head = ["", *(f">{key}" if key != "method" else key for key in keys)]
    head += [">seeds", ">tokens", ">perplexity", "95 %", ">peak", ">time", "pareto"]
    rows = [
        [str(number), *(each.label.get(key, "-") for key in keys), *_figures(each, comparison)]
        for number, each in enumerate(settings, start=1)
    ]
    console.table(head, rows, gap=1)
    for number, each in enumerate(settings, start=1):
        console.result(f"{number}: {', '.join(str(run.folder) for run in each.runs)}")
    if comparison.is_fair:
        judged = ", ".join(comparison.judged_by)
        console.result(f"pareto: no other setting is as good or better in all of {judged}")
    if any(each.loss and each.loss.low is not None for each in settings):
        console.result(f"95 %: {HOW}")
    for each in settings:
        for row in each.published:
            rank = "" if row.rank is None else f" rank {row.rank:g} of the width"
            told = f"published: {row.method}{rank} {row.ppl:g} ({row.source}, {row.mark})"
            console.result(f"{told}; here, evaluated so: {_as_published(each)}")
    for note in comparison.notes:
        console.result(f"note: {note}")


def _figures(setting: Setting, comparison: Comparison) -> list[str]:
    perplexity = setting.perplexity
    if not comparison.is_fair:
        place = "unfair"
    elif setting.dominated_by is not None:
        place = f"no: {setting.dominated_by}"
    else:
        place = "yes"
    return [
        str(len(setting.runs)),
        format_count(setting.tokens),
        "-" if perplexity is None else f"{perplexity.mean:.5g}",
        "" if perplexity is None else _range(perplexity),
        "-" if setting.peak is None else format_bytes(setting.peak.bytes),
        format_seconds(setting.seconds),
        place,
    ]


def _as_published(setting: Setting) -> str:
    """Perplexities by the papers' evaluation, which must not be compared with true ones."""
    told = [run.published_perplexity for run in setting.runs]
    return ", ".join("not known" if each is None else f"{each:.5g}" for each in told)


def _range(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return ""
    return f"{interval.low:.4g}..{interval.high:.4g}"
