"""Fit a configuration to a card: the best that fits, and why the rest was not taken.

What is better, in this order: published quality, in classes of 0.005 nats; a gradient norm that can
be clipped; exact sums of gradients before bf16 and int8; tokens/s, in classes of 3 %; the order of
METHODS, with exact moments and weights first. More memory can therefore never give a worse plan.
"""

from collections.abc import Callable
from dataclasses import replace

from lowmem.config.schema import Config
from lowmem.planner.best import search, too_large_row
from lowmem.planner.candidates import quality
from lowmem.planner.chosen import about_inputs, about_sums, filled_in, notes_of
from lowmem.planner.fixes import fixes
from lowmem.planner.forms import forms_of, resident_forms
from lowmem.planner.hardware import available_memory
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Candidate, Card, Choice, Memory, Plan
from lowmem.planner.settings import fits_at_all, least
from lowmem.planner.speed import estimate, require_rates, within_hours
from lowmem.planner.table import other_rows
from lowmem.planner.ways import curvatures
from lowmem.units import format_bytes

ATTEMPTS = 6


def make_plan(
    config: Config,
    card: Card,
    notes: list[str],
    smaller: Callable[[int], tuple[Config, list[str]]] | None = None,
) -> Plan:
    """The plan of a settled configuration; `Plan.fits` says whether anything fits.

    smaller: the same configuration, settled for another number of sequences per update, with its
    notes; given where nobody asked for a batch, and used where no true batch fits. ConfigError:
    settings that contradict one another.
    """
    if config.train.hours is not None:
        require_rates(card, "bf16" if config.train.weights == "auto" else config.train.weights)
    asked, room = Job.of(config, card), card.usable_bytes
    for _ in range(ATTEMPTS):
        said = notes
        job, rows, choice = _in_any_form(asked, room)
        if choice is None and smaller is not None:
            job, said = _smaller_batch(asked, smaller, notes)
            job, rows, choice = _in_any_form(job, room)
        if choice is None or job.memory(choice).reserved <= room:
            break
        job.learn(choice)  # what the allocator takes beyond the guess, and look again
    if choice is not None:
        if config.train.sums == "auto":
            said = [*about_sums(choice), *said]
        if config.train.boundaries == "auto":
            said = [*about_inputs(choice), *said]
        return _plan(job, choice, other_rows(job, choice, rows, room), said)
    smallest = least(job)
    others = [row for row in rows if row.choice.method != smallest.method]
    return _plan(job, smallest, [too_large_row(job, smallest, room), *others], said)


def _in_any_form(job: Job, room: int) -> tuple[Job, list[Candidate], Choice | None]:
    """The search, and where nothing fits, again in each of the other forms until something does.

    If nothing does, the rows are those of the smallest form of which nothing lies elsewhere.
    """
    resident = resident_forms(job)
    tried: list[tuple[Job, list[Candidate]]] = []
    for number, form in enumerate(forms_of(job)):
        if number >= len(resident) and not fits_at_all(form, room):
            continue  # without the rows that a search makes: nobody will see them
        rows, choice = search(form, room)
        if choice is not None and not _lacks_host_memory(form, choice):
            return form, rows, choice
        tried.append((form, rows))
    return *tried[len(resident) - 1], None


def _lacks_host_memory(job: Job, choice: Choice) -> bool:
    """On this machine; how much the machine of a card that was named has, nobody knows."""
    return job.card.source == "measured" and job.host(choice) > available_memory()


def _smaller_batch(
    job: Job, smaller: Callable[[int], tuple[Config, list[str]]], notes: list[str]
) -> tuple[Job, list[str]]:
    """The largest batch, halved as often as it takes, that fits; the same job where none does."""
    sizes = [job.rows >> halved for halved in range(1, job.rows.bit_length())]

    def of(rows: int) -> tuple[Job, list[str]]:
        config, said = smaller(rows)
        return replace(job, config=config, rows=rows), said

    def fits(rows: int) -> bool:
        return any(fits_at_all(way, job.card.usable_bytes) for way in forms_of(of(rows)[0]))

    for rows in sizes if sizes and fits(1) else []:
        less, said = of(rows)
        if fits(rows):
            why = f"instead of {job.rows}, which do not fit on {job.card.name}"
            return less, [f"batch {rows}seq {why}", *said]
    return job, notes


def _plan(job: Job, choice: Choice, rows: list[Candidate], notes: list[str]) -> Plan:
    """The plan of this choice, rehearsed as a whole."""
    config, card, memory = job.config, job.card, job.memory(choice)
    rows = [_exact(row, memory, card) if row.choice == choice else row for row in rows]
    rows = [replace(row, quality=quality(kind_of(row.choice), job.model)) for row in rows]
    filled = filled_in(config, choice, job.model)
    speed = estimate(job.timed(choice), card)
    if config.train.hours is not None and speed is not None:
        filled, note = within_hours(filled, config.train.hours, speed, job.model)
        notes = [*notes, note]
    if config.optimizer.method == "auto" and memory.reserved <= card.usable_bytes:
        notes = [*notes, f"method {choice.method}: the best published quality that fits"]
    notes = [*notes, *notes_of(config, filled, job.model)]
    if job.tensors(choice) != memory.tensors and not curvatures(kind_of(choice), config.optimizer):
        notes.append("the search and the rehearsal disagree about this plan: please report it")
    cost = quality(kind_of(choice), job.model)
    plan = Plan(filled, card, choice, memory, rows, [], notes, speed, cost, job.stored(choice))
    return plan if plan.fits else replace(plan, fixes=list(fixes(job, choice, memory)))


def _exact(row: Candidate, memory: Memory, card: Card) -> Candidate:
    """The row of the choice, by its replayed peak instead of the guess."""
    excess = memory.reserved - card.usable_bytes
    reason = row.reason if excess <= 0 else f"{format_bytes(excess)} too much"
    return replace(row, fits=excess <= 0, peak_bytes=memory.reserved, bound=False, reason=reason)
