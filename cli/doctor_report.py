"""`lowmem doctor --report`: what a bug report needs, without private paths, host names or tokens.

What may be said is chosen, not what must be hidden: versions, hardware, LOWMEM_ settings, the
resolved configuration of a run, its last events and errors. Paths keep their last part alone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.cli.console import Console
from lowmem.cli.doctor import examine
from lowmem.cli.options import Given
from lowmem.config.flags import ENVIRONMENT, OTHER_VARIABLES
from lowmem.private import without_private
from lowmem.train.run import EVENTS, Run, environment

_LAST_EVENTS = 20
_LAST_ERRORS = 2


def doctor_report(given: Given, run: Path | None, *, as_json: bool) -> None:
    """Print the report as text or JSON."""
    console = Console(quiet=given.quiet)
    content = report(os.environ, run)
    if as_json:
        console.json(content)
        return
    for section, value in content.items():
        console.result(f"## {section}")
        for line in _lines(value):
            console.result(line)
        console.result("")


def report(environ: Mapping[str, str], run: Path | None) -> dict[str, Any]:
    """The report as plain JSON, with everything private taken out."""
    known = {*ENVIRONMENT, *OTHER_VARIABLES}
    found: dict[str, Any] = {
        "schema_version": 1,
        "checks": [
            f"{c.state}: {c.name} {c.text}" for c in examine(environ) if c.name not in known
        ],
        "environment": {k: v for k, v in environment().items() if k != "command"},
        "settings": {name: environ[name] for name in sorted(known & set(environ))},
    }
    if run is not None:
        found["run"] = _run(Run.open(run))
    return without_private(found, environ)


def _run(run: Run) -> dict[str, Any]:
    events = run.folder / EVENTS
    lines = events.read_text("utf-8").splitlines()[-_LAST_EVENTS:] if events.is_file() else []
    errors = sorted((run.folder / "log").glob("error-*.txt"))[-_LAST_ERRORS:]
    return {
        "config": run.config.model_dump(),
        "events": [line[:400] for line in lines],
        "last_metrics": run.metrics()[-3:],
        "errors": [path.read_text("utf-8").splitlines()[-30:] for path in errors],
    }


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        width = max((len(str(key)) for key in value), default=0)
        return [f"  {key!s:{width}}  {json.dumps(item)}" for key, item in value.items()]
    if isinstance(value, list):
        return [f"  {item}" for item in value]
    return [f"  {value}"]
