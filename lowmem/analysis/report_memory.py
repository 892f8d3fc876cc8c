"""What a report tells of memory: plan against measured."""

from html import escape

from lowmem.analysis import markup
from lowmem.analysis.history import History
from lowmem.planner.plan import Plan
from lowmem.train.events import Measured
from lowmem.units import format_bytes, format_count


def memory_section(run: History) -> str:
    """Plan against measured, as far as they are known."""
    plan, measured = run.plan, run.measured
    body = "" if plan is None else markup.table([], _planned(run, plan))
    if plan is None and (run.folder / "plan.json").is_file():
        body = markup.notes(["plan.json is damaged or of another version of lowmem."])
    if measured is not None:
        body += _measured_parts(measured) + markup.notes([_about(plan, measured)])
    elif body:
        body += markup.notes(["The peak of the first update was not measured."])
    return markup.section("Memory: plan against measured", body) if body else ""


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
