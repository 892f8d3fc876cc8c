"""The learning rate as a pure function of the update index, so that a resumed run needs no state.

    cosine, 1000 updates, warm-up 100:  u = 0 -> peak / 101;  u = 100 -> peak;  u >= 1000 -> the end
    wsd, decay 0.2:                     peak from u = 100 to 800, then straight down to the end

    cosine, cycle 1000:                 u = 1000 is u = 0 again

After the last update the rate stays at its end; the papers' cosine starts anew there.
"""

import math
from typing import Literal

from lowmem.config.schema import ScheduleConfig

# The released trainers begin every further cycle so, instead of with 0.
_RESTART, _RESTART_RATIO = 2, 1e-7


def learning_rate(schedule: ScheduleConfig, peak: float, update: int, updates: int) -> float:
    """The rate of the 0-based `update` in a run of `updates`; between 0 and `peak`.

    It falls from `peak` at the end of warm-up to `min_ratio * peak` at `update = updates`, one
    update after the last; "constant" does not fall. With a cycle that holds for every so many
    updates.
    """
    if schedule.cycle:
        cycles, update = divmod(update, schedule.cycle)
        updates = schedule.cycle
        if cycles and update < _RESTART and schedule.start == "zero":
            return peak * _RESTART_RATIO
    warmup = schedule.warmup_updates(updates)
    if update < warmup:
        # Starting at 0 wastes an update, and with it the first subspace: "zero" is for comparisons.
        zero = schedule.start == "zero"
        return peak * (update / warmup if zero else (update + 1) / (warmup + 1))
    fallen = 1.0 - _left(schedule, warmup, update, updates)
    return peak * (1.0 - (1.0 - schedule.min_ratio) * fallen)


def _left(schedule: ScheduleConfig, warmup: int, update: int, updates: int) -> float:
    """What is left of the way from peak (1) to end (0) from `warmup` on."""
    match schedule.kind:
        case "constant":
            return 1.0
        case "wsd":
            begin = max(warmup, updates - round(schedule.decay * updates))
            return 1.0 - _share(update, begin, updates)
        case kind:
            return _shape(kind, _share(update, warmup, updates))


def _share(update: int, begin: int, end: int) -> float:
    """The share of begin..end that is done; 0 before, 1 after."""
    if update >= end:
        return 1.0
    return (update - begin) / (end - begin) if update > begin else 0.0


def _shape(kind: Literal["cosine", "linear", "rex"], done: float) -> float:
    match kind:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return 1.0 - done
        case "rex":  # arXiv:2107.04197: stays high for longer, ends faster
            return (1.0 - done) / (1.0 - 0.5 * done)
