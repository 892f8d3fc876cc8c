"""The table of a plan: beside the choice, what is next in quality, fastest and smallest."""

from collections.abc import Sequence
from dataclasses import replace

from lowmem.planner.best import best_of, rejected_row
from lowmem.planner.candidates import Family, families, quality
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Candidate, Choice
from lowmem.planner.settings import fastest_settings, hoped_for, least, most_rows, ways_of
from lowmem.planner.speed import estimate

_BESIDE = 2  # methods shown after the choice
_FASTEST_TRIED = 3


def other_rows(job: Job, choice: Choice, rows: list[Candidate], room: int) -> list[Candidate]:
    """The table with what else fits: the next methods in quality, the fastest, and the smallest."""
    tried = families(job.config, job.model)
    later = _next_methods(job, tried, choice)
    rows = [row for row in rows if row.choice.method not in later]
    rows = [_replayed(job, row) if row.choice == choice else row for row in rows]
    rows += [_row_of(job, each, room) for each in later.values()]
    if estimate(job.timed(choice), job.card) is not None:
        rows = _labelled(rows, _fastest(job, tried, rows, room), "fastest")
    return _labelled(rows, _smallest(job, rows, room), "smallest")


def _replayed(job: Job, row: Candidate) -> Candidate:
    return replace(row, peak_bytes=job.memory(row.choice).reserved)


def _next_methods(job: Job, tried: Sequence[Family], choice: Choice) -> dict[str, list[Family]]:
    """The families of the methods that come after the choice, best first."""
    rung = quality(kind_of(choice), job.model).rung
    found: dict[str, list[Family]] = {}
    for family in tried:
        if family.method != choice.method and quality(family.best, job.model).rung >= rung:
            found.setdefault(family.method, []).append(family)
    return dict(list(found.items())[:_BESIDE])


def _row_of(job: Job, method: Sequence[Family], room: int) -> Candidate:
    """The best settings of a method that fit, or its smallest."""
    for family in method:
        found = best_of(job, family, room)
        if found is not None:
            return Candidate(found.choice, True, job.peak(found.choice), reason="next in quality")
    rejected = [rejected_row(job, family, room) for family in method]
    return min(rejected, key=lambda row: row.peak_bytes)


def _labelled(rows: list[Candidate], best: Candidate, label: str) -> list[Candidate]:
    """The table with what this row is best for, in the row of its settings if they have one."""
    for at, row in enumerate(rows):
        if row.choice == best.choice:
            return [*rows[:at], replace(best, reason=f"{row.reason}, {label}"), *rows[at + 1 :]]
    return [*rows, replace(best, reason=label)]


def _fastest(job: Job, tried: Sequence[Family], rows: list[Candidate], room: int) -> Candidate:
    """The settings with the shortest update, of any quality: of those in the table and of the few
    others that could be faster."""
    best = min((row for row in rows if row.fits), key=lambda row: job.seconds(row.choice))
    hopes = [
        (job.seconds(hoped_for(job, family.least, way, min(job.rows, most_rows(job)))), family, way)
        for family in tried
        for way in ways_of(job, family.least)
        if job.persistent(family.least, way.place, way.blocks) <= room
    ]
    for hope, family, way in sorted(hopes, key=lambda each: each[0])[:_FASTEST_TRIED]:
        if hope >= job.seconds(best.choice):
            break
        found = fastest_settings(job, family.least, way, room)
        if found is not None and job.seconds(found) < job.seconds(best.choice):
            best = Candidate(found, True, job.peak(found))
    return best


def _smallest(job: Job, rows: list[Candidate], room: int) -> Candidate:
    """The lowest peak: of those in the table and of the settings with the fewest tensors.

    Both they and the choice are replayed: a guess would be above what they take.
    """
    found = least(job)
    fitting = [row for row in rows if row.fits]
    if job.fits(found, room):
        fitting = [row for row in fitting if row.choice != found]
        fitting.append(_replayed(job, Candidate(found, True, 0)))
    return min(fitting, key=lambda row: row.peak_bytes)
