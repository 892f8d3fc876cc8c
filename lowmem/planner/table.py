"""The table of a plan: beside the choice, what is next in quality, fastest and smallest."""

from collections.abc import Sequence
from dataclasses import replace

from lowmem.planner.best import best_of, rejected_row
from lowmem.planner.candidates import Family, families, quality
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Candidate, Choice
from lowmem.planner.settings import fastest_settings, hoped_for, least, most_rows, ways_of

_BESIDE = 2  # methods shown after the choice
_FASTEST_TRIED = 3


def other_rows(job: Job, choice: Choice, rows: list[Candidate], room: int) -> list[Candidate]:
    """The table with what else fits: the next methods in quality, the fastest, and the smallest."""
    tried = families(job.config, job.model)
    later = _next_methods(job, tried, choice)
    rows = [row for row in rows if row.choice.method not in later]
    rows += [_row_of(job, each, room) for each in later.values()]
    rows = _labelled(rows, job, _fastest_of_all(job, tried, choice, room), "fastest")
    smallest = least(job)
    return _labelled(rows, job, smallest, "smallest") if job.fits(smallest, room) else rows


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


def _labelled(rows: list[Candidate], job: Job, choice: Choice, label: str) -> list[Candidate]:
    """The table with what these settings are best for, in their own row if they have none."""
    for at, row in enumerate(rows):
        if row.choice == choice:
            return [*rows[:at], replace(row, reason=f"{row.reason}, {label}"), *rows[at + 1 :]]
    return [*rows, Candidate(choice, True, job.peak(choice), reason=label)]


def _fastest_of_all(job: Job, tried: Sequence[Family], choice: Choice, room: int) -> Choice:
    """The settings with the shortest update, of any quality: of the few that could be fastest."""
    hopes = [
        (job.seconds(hoped_for(job, family.least, way, min(job.rows, most_rows(job)))), family, way)
        for family in tried
        for way in ways_of(job, family.least)
        if job.persistent(family.least, way.place, way.blocks) <= room
    ]
    best = choice
    for hope, family, way in sorted(hopes, key=lambda each: each[0])[:_FASTEST_TRIED]:
        if hope >= job.seconds(best):
            break
        found = fastest_settings(job, family.least, way, room)
        if found is not None:
            best = min(best, found, key=job.seconds)
    return best
