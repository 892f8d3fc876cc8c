"""What a report tells from events: what happened, and which weights have which method."""

from pathlib import Path
from typing import Any

from lowmem.analysis import markup
from lowmem.analysis.history import History
from lowmem.private import without_private
from lowmem.units import format_bytes, format_seconds

_MOST_EVENTS = 200  # the newest


def events_section(run: History) -> str:
    """What happened, the newest last; saves are told in one line."""
    told = [(_at(event), *_event(event)) for event in run.events]
    saves = [event for event in run.events if event.get("event") == "saved"]
    rows = [[at, what, words] for at, what, words in told if what not in ("saved", "assigned")]
    shown = rows[-_MOST_EVENTS:]
    body = markup.table(["update", "event", ""], shown)
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
    return markup.section("Events", body + markup.notes(notes)) if run.events else ""


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
            words = f"{markup.plain(event.get('why'))}; {made}, {count} sequences"
        case "rolledback":
            words = f"{markup.plain(event.get('why'))}; batches {event.get('first')} to "
            words += f"{event.get('last')} are left out, {event.get('number')} of {event.get('of')}"
        case "finished":
            words = f"loss {_number(event, 'eval_loss'):.4f}"
            words += f", {format_seconds(_number(event, 'seconds'))}"
        case "continued":
            words = f"after {format_seconds(_number(event, 'seconds'))}"
        case _:
            rest = {k: v for k, v in event.items() if k not in ("event", "update")}
            words = ", ".join(f"{key}: {markup.plain(value)}" for key, value in rest.items())
    return what, without_private(words)


def _at(event: dict[str, Any]) -> str:
    """Updates done, where an event tells it."""
    update = event.get("update")
    counts_from_0 = event.get("event") in ("skipped", "grown")
    return "" if not isinstance(update, int) else str(update + counts_from_0)


def _number(event: dict[str, Any], key: str) -> float:
    value = event.get(key)
    return value if isinstance(value, int | float) else 0


def methods_section(run: History) -> str:
    """Which weights have which method."""
    assigned = [event for event in run.events if event.get("event") == "assigned"]
    groups = assigned[-1].get("groups") if assigned else None
    rows = []
    for each in groups if isinstance(groups, list) else []:
        if isinstance(each, dict):
            roles, method = (markup.plain(each.get(key)) for key in ("roles", "method"))
            rows.append([roles, f"{_number(each, 'elements'):,.0f}", method])
    table = markup.table(["weights", "elements", "updated by"], rows)
    return markup.section("Method", table) if rows else ""
