"""`lowmem doctor --report`: what a bug report needs, without private paths, host names or tokens.

What may be said is chosen, not what must be hidden: versions, hardware, LOWMEM_ settings, the
resolved configuration of a run, its last events and errors. Paths keep their last part alone.
"""

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.cli.console import Console
from lowmem.cli.doctor import examine
from lowmem.cli.options import Given
from lowmem.config.flags import ENVIRONMENT, OTHER_VARIABLES
from lowmem.train.run import EVENTS, Run, environment

_LAST_EVENTS = 20
_LAST_ERRORS = 2
_SECRET = re.compile(r"(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)[A-Za-z0-9_-]{8,}|[0-9a-f]{40}")
_PATH = re.compile(r"(?:[A-Za-z]:)?[\w.~@+-]*(?:[/\\][\w.@+ -]+)+")


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


def without_private(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with names of this host and its user, tokens and the folders of paths taken out."""
    if isinstance(value, dict):
        return {key: without_private(item, environ) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_private(item, environ) for item in value]
    return _cleaned(value, environ) if isinstance(value, str) else value


def _cleaned(text: str, environ: Mapping[str, str]) -> str:
    text = _SECRET.sub("[secret]", text)
    text = _PATH.sub(lambda found: ".../" + re.split(r"[/\\]", found[0])[-1], text)
    private = {socket.gethostname(): "[host]"}
    private |= {
        environ[name]: "[user]" for name in ("USER", "LOGNAME", "USERNAME") if name in environ
    }
    for word, instead in private.items():
        if len(word) > 2:
            text = re.sub(rf"\b{re.escape(word)}\b", instead, text)
    return text


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        width = max((len(str(key)) for key in value), default=0)
        return [f"  {key!s:{width}}  {json.dumps(item)}" for key, item in value.items()]
    if isinstance(value, list):
        return [f"  {item}" for item in value]
    return [f"  {value}"]
