"""The smallest and the fastest settings of a kind: micro-batch, recomputation and logits."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from lowmem.config.recompute import in_words
from lowmem.config.schema import Logits, settled
from lowmem.planner.candidates import Kind, families, weight_formats
from lowmem.planner.job import Job
from lowmem.planner.plan import Choice
from lowmem.planner.ways import Way, sum_formats, ways

MAX_TOKENS = {"cuda": 32768, "cpu": 4096}  # per micro-batch: more brings no speed
_SMALLEST_TRIED = 3


def least(job: Job) -> Choice:
    """The smallest settings of all: of those with the fewest persistent bytes, the lowest peak."""
    found = families(job.config, job.model)
    coarsest = weight_formats(job.config)[-1]
    kinds = [family.least for family in found if family.weights == coarsest]
    few = sorted(kinds, key=job.persistent)[:_SMALLEST_TRIED]
    return min(all_smallest(job, few), key=job.tensors)


def fits_at_all(job: Job, room: int) -> bool:
    kinds = [family.least for family in families(job.config, job.model)]
    return any(
        job.fits(choice, room)
        for kind in kinds
        if least_persistent(job, kind) <= room
        for choice in all_smallest(job, [kind])
    )


def least_persistent(job: Job, kind: Kind) -> int:
    """Bytes that are always on the device, in the way that leaves most of them on the host."""
    places = {(way.place, way.blocks) for way in ways_of(job, kind)}
    return min(job.persistent(kind, *each) for each in places)


def all_smallest(job: Job, kinds: Iterable[Kind]) -> list[Choice]:
    """With the coarsest sums that are tried."""
    coarsest = [replace(kind, sums=sum_formats(job.config, kind)[-1]) for kind in kinds]
    return [
        choice
        for kind in coarsest
        for way in ways_of(job, kind)
        for choice in smallest_settings(job, kind, way)
    ]


def smallest_settings(job: Job, kind: Kind, way: Way) -> list[Choice]:
    """The smallest settings of a kind in that mode: single sequences, whose gradients are summed,
    or the whole batch at once, which needs no sums; whichever are allowed."""
    fixed = job.config.train.micro_batch
    sizes = {job.rows} if way.update == "fused" else {1, job.rows}
    sizes = sizes if fixed == "auto" else {settled(fixed)}
    return [_smallest_with(job, kind, way, size) for size in sorted(sizes)]


def _smallest_with(job: Job, kind: Kind, way: Way, micro: int) -> Choice:
    return job.choice(kind, way, _recompute(job, way, "full"), _logits(job, "recompute"), micro)


def ways_of(job: Job, kind: Kind) -> list[Way]:
    return ways(job.config, kind, job.rows)


def fastest_settings(job: Job, kind: Kind, way: Way, room: int) -> Choice | None:
    """The fastest micro-batch and recomputation that fit."""
    best: Choice | None = None
    hopes = [hoped_for(job, kind, way, size) for size in _micro_batches(job, kind, way, room)]
    for hope in sorted(hopes, key=job.seconds):
        if best is not None and job.seconds(hope) >= job.seconds(best):
            break
        found = _least_recomputed(job, hope, room)
        if found is not None:
            best = found if best is None else min(best, found, key=job.seconds)
    return best


def hoped_for(job: Job, kind: Kind, way: Way, micro: int) -> Choice:
    """The fastest settings with that micro-batch, if they fit."""
    return job.choice(kind, way, _recompute(job, way, "keep"), _logits(job, "keep"), micro)


def _micro_batches(job: Job, kind: Kind, way: Way, room: int) -> list[int]:
    """Sizes that fit: powers of two, those between them, and the whole batch, which needs no sums.

    The smallest where none does.
    """
    fixed = job.config.train.micro_batch
    if fixed != "auto":
        return [settled(fixed)]
    if way.update == "fused":
        return [job.rows]

    def fits(index: int) -> bool:
        return job.fits(_smallest_with(job, kind, way, sizes[index]), room)

    most = min(most_rows(job), job.rows - 1)
    powers = {size for power in range(20) for size in (2**power, 3 * 2**power)}
    sizes = sorted(size for size in powers if size <= most)
    last = last_that_fits(len(sizes), fits) if sizes else None
    whole = [job.rows] if job.rows <= most_rows(job) or last is None else []
    return [*(sizes[: last + 1] if last is not None else []), *whole]


def most_rows(job: Job) -> int:
    return max(1, MAX_TOKENS[job.config.train.device] // job.seq_len)


def _least_recomputed(job: Job, hope: Choice, room: int) -> Choice | None:
    """As `hope`, which recomputes least, or with as little more recomputed as fits."""
    if job.fits(hope, room):
        return hope
    hopes = [hope]
    if job.config.train.logits == "auto":
        hopes.append(replace(hope, logits="recompute"))
    found = [_fewest_blocks(job, each, room) for each in hopes]
    return min((each for each in found if each is not None), key=job.seconds, default=None)


def _fewest_blocks(job: Job, choice: Choice, room: int) -> Choice | None:
    """With as few blocks recomputed as fit: the upper blocks keep everything first."""
    if job.config.train.recompute != "auto" or choice.update == "layer-major":
        return choice if job.fits(choice, room) else None
    blocks = job.model.num_hidden_layers

    def at(keep: int, attn: int) -> Choice:
        return replace(choice, recompute=in_words(keep, attn, blocks))

    def fitting(of: Callable[[int], Choice], most: int) -> int | None:
        return last_that_fits(most + 1, lambda count: job.fits(of(count), room))

    more = fitting(lambda count: at(1 + count, 0), blocks - 1)
    if more is None:
        return None
    keep = 1 + more
    attn = fitting(lambda count: at(keep, count), blocks - keep) or 0
    alone = fitting(lambda count: at(1, count), blocks - 1) or 0
    return min(at(keep, attn), at(1, alone), key=job.seconds)


def _recompute(job: Job, way: Way, wanted: str) -> str:
    """What is wanted, unless the user fixed it, or layer-major order does."""
    if way.update == "layer-major":
        return "full"
    fixed = job.config.train.recompute
    return wanted if fixed == "auto" else fixed


def _logits(job: Job, wanted: Logits) -> Logits:
    fixed = job.config.train.logits
    return wanted if fixed == "auto" else settled(fixed)


def last_that_fits(count: int, fits: Callable[[int], bool]) -> int | None:
    """The last index that fits, of those of which all before it fit too."""
    if not fits(0):
        return None
    if fits(count - 1):
        return count - 1
    low, high = 0, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
