"""The pieces of a report's page: text becomes HTML here, and is escaped."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lowmem.private import without_private


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text; the first of a row without a head is its name."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = []
    for row in rows:
        first, *others = (escape(cell) for cell in row)
        name = f"<td>{first}</td>" if head else f"<th>{first}</th>"
        body.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    heading = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f"<table>{heading}<tbody>{''.join(body)}</tbody></table>"


def bullets(items: Iterable[str]) -> str:
    cleaned = (escape(without_private(item)) for item in items)
    return f"<ul>{''.join(f'<li>{item}</li>' for item in cleaned)}</ul>"


def notes(lines: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines if line)


def plain(value: Any) -> str:
    """A value of a file as text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return str(without_private(text))
