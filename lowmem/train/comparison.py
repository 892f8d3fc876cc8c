"""What a plan promised beside what was measured, segment by segment."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import reduce

from lowmem.planner.allocator import Allocator, Peaks, expandable_segments
from lowmem.planner.calibration import Row
from lowmem.planner.live_bytes import PERSISTENT, Segment
from lowmem.planner.plan import Plan
from lowmem.planner.rehearse import GATHER, STEP, Rehearsal
from lowmem.train.meters import Reading

BUILD, SAVE, WHOLE = "built", "save", "whole run"


@dataclass(frozen=True)
class Measured:
    """persistent: bytes of each part after building. reserved: at the end, on CUDA."""

    persistent: dict[str, int]
    readings: dict[str, Reading]
    tables: int
    reserved: int


def compared(plan: Plan, rehearsal: Rehearsal, measured: Measured) -> Iterator[Row]:
    """Planned beside measured: what persists by part, then the peak of every segment."""
    for part in PERSISTENT:
        planned = rehearsal.persistent.get(part, 0)
        if planned or measured.persistent.get(part):
            yield Row(BUILD, part, planned, measured.persistent.get(part, 0))
    yield from _categories(plan, rehearsal, measured)
    segments = planned_peaks(rehearsal)
    memory = Peaks(plan.memory.tensors, plan.memory.allocated, plan.memory.reserved)
    most = reduce(Reading.then, (measured.readings[name] for name in segments))
    readings = {**measured.readings, WHOLE: most}
    for name, peaks in {**segments, WHOLE: memory}.items():
        reading = readings[name]
        if reading.tensors is not None:
            yield Row(name, "tensors", peaks.tensors, reading.tensors + measured.tables)
        else:
            yield Row(name, "allocated", peaks.allocated, reading.allocated)
            yield Row(name, "reserved", peaks.reserved, reading.reserved)


def _categories(plan: Plan, rehearsal: Rehearsal, measured: Measured) -> Iterator[Row]:
    """What comes and goes, by what it is for; the sums of it with what persists are judged."""
    on_cuda = plan.config.train.device == "cuda"
    planned = sum(rehearsal.persistent.values())
    real = sum(measured.persistent.values()) - measured.tables
    real += plan.card.workspace if on_cuda else 0  # as in the plan; see Calibration.workspace
    gather, step = rehearsal.segments[GATHER], rehearsal.segments[STEP]
    gathered, stepped = measured.readings[GATHER], measured.readings[STEP]
    most = gathered.highest - real
    yield Row(GATHER, "activations, loss, gradients", gather.peak - planned, most, False)
    yield Row(GATHER, "held at its end", gather.end - planned, gathered.end - real, False)
    more = stepped.highest - gathered.end
    yield Row(STEP, "temporaries", step.peak - gather.end, more, False)


def planned_peaks(rehearsal: Rehearsal) -> dict[str, Peaks]:
    """The peaks of every segment by the replayed allocations; saving takes nothing on the device.

    The first update of a name that comes again is merged with the second.
    """
    allocator = Allocator(expandable_segments())
    done = 0
    found: dict[str, Peaks] = {}
    for start, stop, name in sorted(_stretches(rehearsal.segments)):
        allocator.run(rehearsal.events[done:start])
        allocator.reset_peaks()
        allocator.run(rehearsal.events[start:stop])
        peaks = allocator.peaks
        if name in found:
            peaks = Peaks(*map(max, astuple(found[name]), astuple(peaks)))
        found[name] = peaks
        done = stop
    allocator.reset_peaks()
    return {**found, SAVE: allocator.peaks}


def _stretches(segments: dict[str, Segment]) -> Iterator[tuple[int, int, str]]:
    for name, segment in segments.items():
        for start, stop in segment.events:
            yield start, stop, name
