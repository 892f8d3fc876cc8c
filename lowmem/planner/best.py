"""The best settings that fit.

Families (`candidates.py`) are tried in the order of the quality of their best rank, until what was
found is better than anything the rest could be. Of a family the class of quality is decided first,
by the largest rank that fits with the smallest settings; then the fastest settings that fit with
the least rank of that class; then the rank is raised as far as these settings leave room.
"""

import math
import sys
from dataclasses import dataclass, replace

from lowmem.config.schema import MOVE_EARLY, SumFormat
from lowmem.planner.candidates import Family, Kind, families, quality
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Candidate, Choice
from lowmem.planner.settings import (
    all_smallest,
    fastest_settings,
    last_that_fits,
    least_persistent,
    smallest_settings,
    ways_of,
)
from lowmem.planner.ways import Way, sum_formats
from lowmem.units import format_bytes

SPEED_CLASS = 1.03
SUM_FORMATS: tuple[SumFormat, ...] = ("fp32", "bf16", "int8", "host")  # the most exact first


@dataclass(frozen=True)
class Found:
    """Settings that fit, and what they are judged by: class of quality, whether the norm is known
    too late to be clipped, how coarse the sums are, class of speed. Smaller is better."""

    choice: Choice
    order: tuple[int, bool, int, int]


@dataclass(frozen=True)
class Reach:
    """How far a family goes in one way: the kinds of its best class of quality that fit, of rising
    rank, the first two parts of `Found.order`, and the smallest settings of the last kind."""

    kinds: list[Kind]
    way: Way
    order: tuple[int, bool]
    smallest: Choice


def search(job: Job, room: int) -> tuple[list[Candidate], Choice | None]:
    """(rows of the table, the best choice that fits in `room`, if any)."""
    best: Found | None = None
    rejected: dict[str, Candidate] = {}
    for family in families(job.config, job.model):
        if best is not None and quality(family.best, job.model).rung > best.order[0]:
            break
        found = best_of(job, family, room, best)
        if found is None:
            row = rejected_row(job, family, room)
            if family.method not in rejected or row.peak_bytes < rejected[family.method].peak_bytes:
                rejected[family.method] = row
        elif best is None or found.order < best.order:
            best = found
    rows = list(rejected.values())
    if best is None:
        return rows, None
    peak = job.peak(best.choice)
    rows = [row for row in rows if row.choice.method != best.choice.method]
    return [*rows, Candidate(best.choice, True, peak, reason="chosen")], best.choice


def best_of(job: Job, family: Family, room: int, than: Found | None = None) -> Found | None:
    """The best settings of a family that fit; if worse than those of `than`, any that fit.

    Ways are compared by what is cheap to know, and only the fastest settings of the best sought.
    """
    if least_persistent(job, family.least) > room:
        return None
    reached = [_reach(job, family, way, room) for way in ways_of(job, family.least)]
    found: Found | None = None
    for reach in sorted((each for each in reached if each), key=lambda each: each.order):
        rival = found or than
        if rival is not None and reach.order > rival.order[:2]:
            return found or Found(reach.smallest, (*reach.order, sys.maxsize, 0))
        fastest = _fastest_in(job, reach, room)
        if fastest is not None and (found is None or fastest.order < found.order):
            found = fastest
    return found


def _reach(job: Job, family: Family, way: Way, room: int) -> Reach | None:
    """With the most exact sums with which anything fits."""
    exact: list[SumFormat] = ["fp32"]
    layer_major = way.update == "layer-major"
    for sums in exact if layer_major else sum_formats(job.config, family.least):
        kinds = [replace(family, sums=sums).kind(rank) for rank in family.ranks]
        reach = _reach_of(job, kinds, way, room)
        if reach is not None:
            return reach
    return None


def _reach_of(job: Job, kinds: list[Kind], way: Way, room: int) -> Reach | None:
    def fitting(index: int) -> list[Choice]:
        return [each for each in smallest_settings(job, kinds[index], way) if job.fits(each, room)]

    top = last_that_fits(len(kinds), lambda index: bool(fitting(index)))
    if top is None:
        return None
    rung, low = quality(kinds[top], job.model).rung, top
    if job.config.optimizer.rank == "auto":  # a rank that was asked for is not given up for speed
        low = next(i for i in range(top + 1) if quality(kinds[i], job.model).rung <= rung)
    early = way.update in MOVE_EARLY
    return Reach(kinds[low : top + 1], way, (rung, early), fitting(top)[0])


def _fastest_in(job: Job, reach: Reach, room: int) -> Found | None:
    """The fastest settings with the least rank, then the largest rank for which they leave room."""
    settings = fastest_settings(job, reach.kinds[0], reach.way, room)
    if settings is None:
        return None

    def of(index: int) -> Choice:
        return replace(settings, rank=reach.kinds[index].rank)

    choice = of(last_that_fits(len(reach.kinds), lambda index: job.fits(of(index), room)) or 0)
    coarse = SUM_FORMATS.index(choice.sums)
    return Found(choice, (*reach.order, coarse, _speed_class(job, settings)))


def _speed_class(job: Job, choice: Choice) -> int:
    """Of the time per update: smaller is faster."""
    return math.floor(math.log(job.seconds(choice)) / math.log(SPEED_CLASS))


def rejected_row(job: Job, family: Family, room: int) -> Candidate:
    """The row of a family of which nothing fits."""
    if least_persistent(job, family.least) > room:
        return too_large_row(job, all_smallest(job, [family.least])[0], room)
    return too_large_row(job, min(all_smallest(job, [family.least]), key=job.tensors), room)


def too_large_row(job: Job, least: Choice, room: int) -> Candidate:
    """A row for settings that do not fit although there are no smaller ones."""
    bound = job.persistent(kind_of(least), least.place, least.blocks)
    if bound <= room:
        bound += job.sums(least)
    if bound > room:
        reason = f"{format_bytes(bound - room)} too much in weights, states and sums alone"
        return Candidate(least, False, bound, bound=True, reason=reason)
    peak = job.peak(least)
    where = f"even with micro-batch {least.micro_batch} and recompute {least.recompute}"
    return Candidate(least, False, peak, reason=f"{format_bytes(peak - room)} too much {where}")
