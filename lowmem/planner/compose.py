"""The exact peak of any depth and method, from small rehearsals that candidates share.

Two things are rehearsed apart, once each:

    ModelBytes      a model with a block of each level whose gradients nobody keeps: bytes at every
                    moment, and at which of them each weight's gradient is handed over
    OptimizerBytes  what the optimizer adds, weight by weight: bytes at the worst moment of each
                    call beyond those before it, and bytes that stay

Blocks are alike, so another depth or other recomputation levels are the same moments at other
heights. `compose` walks along an update and adds both up. It equals the rehearsal of the whole
model to the byte (tests/planner/test_compose.py) in a thousandth of the time.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lowmem.config.recompute import levels_of
from lowmem.planner.model_bytes import LIKE, ModelBytes, Moment, Pass
from lowmem.planner.optimizer_bytes import Cost, OptimizerBytes
from lowmem.planner.persistent import block_prefix


def compose(model: ModelBytes, optimizer: OptimizerBytes, recompute: str, blocks: int) -> int:
    """The peak of an update and an evaluation batch, in bytes of live tensors.

    blocks: of the whole model.
    """
    if model.layer_major:
        like = list(range(min(blocks, len(LIKE))))
        like[1:1] = [1] * (blocks - len(like))
    else:
        before = len(model.passes[0].forward) - len(LIKE)
        levels = [*levels_of(recompute, blocks)[:-1], LIKE[-1]]
        like = [before + LIKE.index(level) for level in levels]
    held = most = 0
    for number, each in enumerate(model.passes):
        taken: Counter[str] = Counter()
        for moments, shift, block in _in_time(each, like):
            peak, left = _walked(moments, optimizer.costs, number, block, taken)
            most, held = max(most, held + shift + peak), held + left
    return optimizer.persistent + max(most, _stepped(model, optimizer, held))


def _in_time(each: Pass, like: Sequence[int]) -> Iterator[tuple[list[Moment], int, str]]:
    """(moments, how much higher they are than rehearsed, prefix of the names of their weights).

    like: for every block of the model, which of the rehearsed ones it is like.
    """
    shifts = _shifts(each, like)
    yield each.opening, 0, ""
    for at, shift in zip(like, shifts, strict=True):
        yield each.forward[at].moments, shift, ""
    yield each.turn, shifts[-1], ""
    for index in reversed(range(len(like))):
        shift = shifts[index] - (0 if index else each.ahead)
        yield each.backward[like[index]].moments, shift, block_prefix(index)
    yield each.closing, 0, ""


def _shifts(each: Pass, like: Sequence[int]) -> list[int]:
    """Below a block's moments lies what the blocks before it keep."""
    starts = [section.start for section in each.forward]
    height, shifts = starts[0], []
    for at in like:
        shifts.append(height - starts[at])
        if at + 1 < len(starts):
            height += starts[at + 1] - starts[at]
    return shifts


def _walked(
    moments: Iterable[Moment],
    costs: Mapping[str, Cost],
    number: int,
    block: str,
    taken: Counter[str],
) -> tuple[int, int]:
    """(the highest of these moments with what the optimizer adds, bytes that it keeps).

    taken: of every weight, how many pieces were handed before; a tied head's are the embedding's.
    """
    most = held = 0
    for moment in moments:
        if not moment.handed:
            most = max(most, held + moment.live)
            continue
        name = block + moment.handed
        call = costs[name].received[number][taken[name]]
        taken[name] += 1
        most = max(most, held + moment.live + call.extra)
        held += call.left
    return most, held


def _stepped(model: ModelBytes, optimizer: OptimizerBytes, held: int) -> int:
    """The peak of norm, clipping, `step` and an evaluation batch after the last micro-batch."""
    most, squares = model.resting + held + optimizer.norm.extra, 0
    for cost in optimizer.costs.values():
        most = max(most, model.resting + held + squares + cost.square.extra)
        squares += cost.square.left
    held += optimizer.norm.left
    for cost in optimizer.costs.values():
        most = max(most, model.resting + held + cost.step.extra)
        held += cost.step.left
    held += optimizer.norm.rest - optimizer.norm.left
    return max(most, model.evaluation + held)
