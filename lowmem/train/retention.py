"""Which checkpoints stay: the last ones, the best, every so many, and what a rollback needs."""

from collections.abc import Collection

from lowmem.config.schema import CheckpointConfig


def superseded(
    older: Collection[int], newest: int, config: CheckpointConfig, *, best: int | None, reach: int
) -> list[int]:
    """Those of the updates `older` (all below `newest`) whose checkpoints may go, in order.

    best: the update of the best evaluation, None where it is not asked for. reach: of a rollback.
    """
    last = sorted(older)[len(older) - min(config.keep - 1, len(older)) :]
    for_good = {u for u in older if config.keep_every and u % config.keep_every == 0}
    needed = {*last, *for_good, *_anchors(older, newest, reach)} | {best}
    return [update for update in sorted(older) if update not in needed]


def kept_at_most(config: CheckpointConfig, every: int, updates: int, reach: int) -> int:
    """Checkpoints that stand beside the one being written, those kept for good left out.

    every: updates between two saves, 0: one at the end.
    """
    if every == 0:
        return 1 + config.keep_best
    most, kept = 1, set[int]()
    passing = config.model_copy(update={"keep_every": 0})
    # After a few stretches of `reach` updates nothing new can happen.
    for newest in range(every, min(updates, 4 * reach + every * (config.keep + 1)) + 1, every):
        kept -= {*superseded(kept, newest, passing, best=None, reach=reach)}
        kept.add(newest)
        most = max(most, len(kept))
    return most + config.keep_best


def _anchors(older: Collection[int], newest: int, reach: int) -> set[int]:
    """The first checkpoint of each stretch of `reach` updates, back to one that is `reach` old.

    The first stretch needs none: a rollback can begin with new weights as well.
    """
    firsts: dict[int, int] = {}
    for update in sorted(older):
        if reach and update >= reach:
            firsts.setdefault(update // reach, update)
    far = max((update for update in firsts.values() if update <= newest - reach), default=0)
    return {update for update in firsts.values() if update >= far}
