"""`lowmem results`: what is published of methods, from configs/quality.toml."""

from dataclasses import asdict

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.errors import ConfigError, nearest, short
from lowmem.planner.quality import Evidence, Figure, evidence, figures

PERPLEXITY = "perplexity"


def results(given: Given, size: str | None, method: str | None, *, as_json: bool) -> None:
    """Perplexities, then memory and speed. ConfigError: nothing is published of that name."""
    console = Console(quiet=given.quiet)
    wanted = None if size is None else size.lower().removeprefix("llama-")
    every: list[Evidence | Figure] = [*evidence(), *figures()]
    _check("--model", wanted, {row.size for row in every})
    _check("--method", method, {row.method for row in every})
    perplexities = [row for row in evidence() if _is_asked(row, wanted, method)]
    others = [row for row in figures() if _is_asked(row, wanted, method)]
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "perplexities": [asdict(row) for row in perplexities],
                "figures": [asdict(row) for row in others],
            }
        )
        return
    columns = ["model", "method", "what", ">value", "unit", "benchmark or setting", "reading"]
    rows = [
        [row.size, _name(row), PERPLEXITY, f"{row.ppl:.2f}", "", row.protocol, row.reading]
        for row in perplexities
    ]
    rows += [
        [row.size, _name(row), row.what, f"{row.value:g}", row.unit, row.setting, row.reading]
        for row in others
    ]
    sources = [*(row.source for row in perplexities), *(row.source for row in others)]
    told = [[*row, source] for row, source in zip(rows, sources, strict=True)]
    console.table([*columns, "source"], told)


def _check(flag: str, wanted: str | None, known: set[str]) -> None:
    if wanted is not None and wanted not in known:
        raise ConfigError(
            f"{flag} {short(wanted)}: nothing is published of it",
            f"known: {', '.join(sorted(known))}",
            nearest(wanted, known) or "lowmem results",
        )


def _is_asked(row: Evidence | Figure, size: str | None, method: str | None) -> bool:
    return size in (None, row.size) and method in (None, row.method)


def _name(row: Evidence | Figure) -> str:
    return row.method if row.variant is None else f"{row.method} ({row.variant})"
