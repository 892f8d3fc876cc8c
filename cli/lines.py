"""Events of a run as lines of text, with the same columns in a terminal and in a log."""

import math
from collections.abc import Callable, Iterator

from lowmem.train.events import (
    Assigned,
    Capped,
    Continued,
    Converted,
    Diagnosed,
    Eased,
    Evaluated,
    Event,
    Finished,
    Grown,
    Measured,
    Paused,
    RolledBack,
    Saved,
    Skipped,
    Started,
    Stopping,
    Storage,
    Trained,
    Tried,
    perplexity,
)
from lowmem.units import GIB, format_bytes, format_count, format_seconds

_HEADING_EVERY = 40  # lines
_SMOOTHING = 0.9  # of seconds per update, for the time that remains


def heading() -> str:
    return (
        f"{'update':>8} {'loss':>8} {'ppl':>9} {'lr':>8} {'|g|':>8} {'tok/s':>8}"
        f" {'GiB':>6} {'tokens':>8}  eta"
    )


class EventLines:
    """Lines for events; of updates at most one per `interval` seconds, plus the first and last."""

    def __init__(
        self,
        *,
        interval: float,
        clock: Callable[[], float],
        stamp: Callable[[], str],
        parts: bool = False,
    ) -> None:
        """parts: memory by category, too."""
        self._interval, self._clock, self._stamp, self._parts = interval, clock, stamp, parts
        self._last = -math.inf
        self._printed = 0
        self._updates = 0
        self._left = 0
        self._seconds: float | None = None  # smoothed, per update
        self._kept_bases = 0  # told of so far

    def of(self, event: Event) -> list[str]:
        """The lines to show for `event`, none where it is left out."""
        return [f"{self._stamp()}{line}" for line in self._lines(event)]

    def remaining(self) -> str:
        """The time until the last update, at the present speed."""
        return format_seconds(self._left * self._seconds) if self._seconds is not None else "?"

    def _lines(self, event: Event) -> list[str]:
        match event:
            case Started():
                return self._started(event)
            case Assigned():
                return list(_assigned(event))
            case Trained():
                return self._trained(event)
            case Diagnosed():
                return self._diagnosed(event)
            case Evaluated():
                return [self._evaluated(event)]
            case Storage():
                return list(_storage(event))
            case Saved():
                size, took = format_bytes(event.bytes), format_seconds(event.seconds)
                blocked = f"training waited {format_seconds(event.blocked)}"
                return [f"{event.update:>8} saved {event.path}, {size}, {took}, {blocked}"]
            case Measured():
                return list(_measured(event, self._parts))
            case Grown():
                return [_grown(event)]
            case Capped():
                return [_capped(event)]
            case Tried():
                took = format_seconds(event.seconds)
                return [f"{'':>8} an update of random text, refresh and all, fits: {took}"]
            case Eased():
                return list(_eased(event))
            case Skipped():
                return list(_skipped(event))
            case RolledBack():
                return self._rolled_back(event)
            case Paused():
                return [f"{'':>8} waiting: {event.why}"]
            case Continued():
                return [f"{'':>8} going on after {format_seconds(event.seconds)}"]
            case Converted():
                return list(_converted(event))
            case Stopping():
                return [f"{'':>8} {event.signal}: the run stops after this update"]
            case Finished():
                done = f"{event.update:>8} updates done, {format_seconds(event.seconds)}"
                return [done, *(f"{'':>8} for want of memory: {said}" for said in event.eased)]

    def _started(self, event: Started) -> list[str]:
        self._updates = event.updates
        self._left = event.updates - event.update
        tokens = format_count(event.tokens_per_update)
        if event.resumed_from is None:
            return [f"{event.folder}: {event.updates} updates of {tokens} tokens"]
        if event.update >= event.updates:
            return [f"{event.folder}: all {event.updates} updates are done"]
        first = f"{event.folder}: continuing with update {event.update + 1} of {event.updates}"
        lines = [f"{first} from {event.resumed_from}"]
        if event.bits_differ_by:
            lines.append(f"{'':>8} not bit for bit: {'; '.join(event.bits_differ_by)}")
        return lines

    def _trained(self, event: Trained) -> list[str]:
        done = event.update + 1
        self._left = max(0, self._updates - done)
        earlier = self._seconds if self._seconds is not None else event.seconds
        self._seconds = _SMOOTHING * earlier + (1 - _SMOOTHING) * event.seconds
        now = self._clock()
        if self._printed and self._left and now - self._last < self._interval:
            return []
        self._last = now
        head = [heading()] if self._printed % _HEADING_EVERY == 0 else []
        self._printed += 1
        return [*head, self._row(event, done)]

    def _row(self, event: Trained, done: int) -> str:
        return (
            f"{done:>8} {event.loss:>8.4f} {perplexity(event.loss):>9.5g} {event.lr:>8.2e}"
            f" {event.grad_norm:>8.3g} {format_count(event.tokens_per_second):>8}"
            f" {event.memory_bytes / GIB:>6.2f} {format_count(event.tokens):>8}"
            f"  {self.remaining()}"
        )

    def _rolled_back(self, event: RolledBack) -> list[str]:
        where = f"update {event.update}" if event.update else "the beginning"
        batches = f"the batches of updates {event.first + 1} to {event.last + 1}"
        return [
            f"{'':>8} rollback {event.number} of {event.of} to {where},"
            f" leaving out {batches}: {event.why}"
        ]

    def _diagnosed(self, event: Diagnosed) -> list[str]:
        """Only what someone should know at once: that subspaces could not be chosen anew."""
        kept = int(event.diagnostics.get("kept_bases") or 0)
        if kept <= self._kept_bases:
            return []
        self._kept_bases = kept
        line = f"{event.update + 1:>8} {kept} decompositions failed so far"
        return [f"{line}: each time a matrix kept its old subspace"]

    def _evaluated(self, event: Evaluated) -> str:
        published = event.published_loss
        told = "" if published is None else f", as published {perplexity(published):.5g}"
        return (
            f"{event.update + 1:>8} {event.eval_loss:>8.4f} {perplexity(event.eval_loss):>9.5g}"
            f" validation{told}, {format_count(event.eval_tokens)} tokens,"
            f" {format_seconds(event.seconds)}" + (", best so far" if event.best else "")
        )


def _assigned(event: Assigned) -> Iterator[str]:
    whole = sum(group.elements for group in event.groups)
    for group in event.groups:
        elements = f"{format_count(group.elements)} of {format_count(whole)} elements"
        yield f"{'':>8} {group.roles}: {group.weights} weights, {elements}"
        yield f"{'':>8}   {group.method}"


def _measured(event: Measured, with_parts: bool) -> Iterator[str]:
    what = f"peak of {event.what}"
    yield f"{'':>8} {what} {_beside(event.planned, event.measured)}"
    for part in event.parts if with_parts else []:
        if part.measured is not None:
            yield f"{'':>8}   {part.name:<{len(what) - 2}} {_beside(part.planned, part.measured)}"


def _beside(planned: int, measured: int) -> str:
    error = f", {measured / planned - 1:+.1%}" if planned else ""
    return f"{format_bytes(measured)} (plan {format_bytes(planned)}{error})"


def _grown(event: Grown) -> str:
    measured, planned = format_bytes(event.measured), format_bytes(event.planned)
    if event.whose == "others":
        why = f"other programs use {measured} of the card, the plan knew of {planned}"
        return f"{event.update + 1:>8} warning: {why}; the run may not fit for long"
    why = f"this run has reserved {measured}, the plan said {planned}"
    return f"{event.update + 1:>8} warning: {why}; please report this as a bug"


def _capped(event: Capped) -> str:
    budget, ballast = format_bytes(event.budget), format_bytes(event.ballast)
    return f"{'':>8} capped at {budget}, the budget on {event.card}; {ballast} of its margin spare"


def _eased(event: Eased) -> Iterator[str]:
    why = f"out of memory, {event.where}" if event.where else "others have grown beyond the margin"
    yield f"{event.update + 1:>8} {why}: {event.said}"
    if event.reason:
        yield f"{'':>8}   {event.reason}"


def _storage(event: Storage) -> Iterator[str]:
    one, all_of_them = format_bytes(event.checkpoint), format_bytes(event.kept * event.checkpoint)
    free = format_bytes(event.free)
    yield f"{'':>8} checkpoints of {one}, at most {event.kept} = {all_of_them}; {free} are free"
    if event.host_copy:
        copy = format_bytes(event.host_copy)
        yield f"{'':>8} written while training goes on, from a copy of {copy} in host memory"
    else:
        yield f"{'':>8} training waits while they are written: {event.why}"


_SEQUENCES_SHOWN = 4


def _skipped(event: Skipped) -> Iterator[str]:
    left = "was made all the same" if event.made else "was not made"
    yield f"{event.update + 1:>8} {left}: {event.why}"
    shown = event.sequences[:_SEQUENCES_SHOWN]
    more = len(event.sequences) - len(shown)
    yield f"{'':>8}   its text: {', '.join(shown)}" + (
        f" and {more} more sequences in events.jsonl" if more else ""
    )


def _converted(event: Converted) -> Iterator[str]:
    """What was taken over from a checkpoint of other settings, a row for each part."""
    width = max(len(part.part) for part in event.parts)
    yield f"{'':>8} other settings after update {event.update}:"
    yield f"{'':>8} {'taken over':<{width}}  exact    error"
    for part in event.parts:
        error = f"{part.error:.1e}" if part.error else "-"
        exact = "yes" if part.exact else "no"
        yield f"{'':>8} {part.part:<{width}}  {exact:<5}  {error:>7}  {part.becomes}"
