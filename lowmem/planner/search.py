"""Fit a configuration to a card: the best that fits, and why the rest was not taken.

What is better, in this order: published quality, in classes of 0.005 nats; a gradient norm that can
be clipped; exact sums of gradients before bf16 and int8; tokens/s, in classes of 3 %; the order of
METHODS, with exact moments and weights first. More memory can therefore never give a worse plan.

Families (`candidates.py`) are tried in the order of the quality of their best rank, until what was
found is better than anything the rest could be. Of a family the class of quality is decided first,
by the largest rank that fits with the smallest settings; then the fastest settings that fit with
the least rank of that class; then the rank is raised as far as these settings leave room.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.config.recompute import in_words
from lowmem.config.schema import (
    MOVE_EARLY,
    Config,
    Logits,
    ModelConfig,
    SumFormat,
    settled,
)
from lowmem.optim.assign import learning_rate, weight_decay
from lowmem.optim.methods import METHODS, method_spec
from lowmem.optim.methods.third_party import package_of, refused
from lowmem.planner.candidates import (
    Family,
    Kind,
    families,
    quality,
    sheet_settings,
    weight_formats,
)
from lowmem.planner.fixes import fixes
from lowmem.planner.hardware import available_memory
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import INSTEAD, Candidate, Card, Choice, Memory, Plan
from lowmem.planner.speed import estimate, require_rates, within_hours
from lowmem.planner.ways import Way, curvatures, sum_formats, ways
from lowmem.units import format_bytes

MAX_TOKENS = {"cuda": 32768, "cpu": 4096}  # per micro-batch: more brings no speed
ATTEMPTS = 6
SPEED_CLASS = 1.03
SUM_FORMATS: tuple[SumFormat, ...] = ("fp32", "bf16", "int8", "host")  # the most exact first
_BESIDE = 2  # methods shown after the choice
_SMALLEST_TRIED = _FASTEST_TRIED = 3


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
            said = [*_about_sums(job, choice), *said]
        if config.train.boundaries == "auto":
            said = [*_about_inputs(job, choice), *said]
        return _plan(job, choice, _others(job, choice, rows, room), said)
    smallest = least(job)
    others = [row for row in rows if row.choice.method != smallest.method]
    return _plan(job, smallest, [_too_large(job, smallest, room), *others], said)


def _in_any_form(job: Job, room: int) -> tuple[Job, list[Candidate], Choice | None]:
    """The search, and where nothing fits, again in each of the other forms until something does.

    If nothing does, the rows are those of the smallest form of which nothing lies elsewhere.
    """
    resident = _resident_forms(job)
    tried: list[tuple[Job, list[Candidate]]] = []
    for number, form in enumerate(_forms(job)):
        if number >= len(resident) and not _fits_at_all(form, room):
            continue  # without the rows that a search makes: nobody will see them
        rows, choice = search(form, room)
        if choice is not None and not _lacks_host_memory(form, choice):
            return form, rows, choice
        tried.append((form, rows))
    return *tried[len(resident) - 1], None


def _lacks_host_memory(job: Job, choice: Choice) -> bool:
    """On this machine; how much the machine of a card that was named has, nobody knows."""
    return job.card.source == "measured" and job.host(choice) > available_memory()


def _forms(job: Job) -> list[Job]:
    """The job; with int8 embedding and head; in layer-major order; then what takes host memory,
    the least traffic first: block inputs there, sums there, both."""
    forms = _resident_forms(job)
    order = _layer_major(job)
    inputs = [away for form in forms if (away := _inputs_away(form)) is not None]
    sums = [away for form in (*forms, *inputs) if (away := _on_host(form)) is not None]
    return [*forms, *([] if order is None else [order]), *inputs, *sums]


def _resident_forms(job: Job) -> list[Job]:
    return [form for form in (job, _coarser(job)) if form is not None]


def _on_host(job: Job) -> Job | None:
    """The same job with sums in host memory, None where the user wants it otherwise."""
    train = job.config.train
    if train.device != "cuda" or train.sums != "auto" or job.rows == 1:
        return None
    if train.update in MOVE_EARLY or train.blocks == "host" or _follows_curvature(job):
        return None
    return _with(job, sums="host")


def _inputs_away(job: Job) -> Job | None:
    """The same job with block inputs in host memory, None where that is no choice."""
    train = job.config.train
    if train.device != "cuda" or train.boundaries != "auto" or train.update == "layer-major":
        return None
    if train.blocks == "host" or job.model.num_hidden_layers == 1:
        return None
    return _with(job, boundaries="host")


def _with(job: Job, **train: Any) -> Job:
    settings = job.config.train.model_copy(update=train)
    return replace(job, config=job.config.model_copy(update={"train": settings}))


def _layer_major(job: Job) -> Job | None:
    """The same job in layer-major order, None where the user wants it otherwise.

    It takes no host memory where nobody has said that there is some to spare.
    """
    train, optimizer = job.config.train, job.config.optimizer
    if train.update != "auto" or job.rows == 1 or train.sums not in ("auto", "fp32"):
        return None
    if "host" in (train.blocks, optimizer.place):
        return None
    if isinstance(train.clip, float) or train.recompute not in ("auto", "full"):
        return None
    if _follows_curvature(job):
        return None
    boundaries = "keep" if train.boundaries == "auto" else train.boundaries
    places = {"boundaries": boundaries, "blocks": "device"}
    train = train.model_copy(update={"update": "layer-major", **places})
    optimizer = optimizer.model_copy(update={"place": "device"})
    config = job.config.model_copy(update={"train": train, "optimizer": optimizer})
    return replace(job, config=config)


def _follows_curvature(job: Job) -> bool:
    return bool(curvatures(families(job.config, job.model)[0].least, job.config.optimizer))


def _coarser(job: Job) -> Job | None:
    """The same job with everything in int8 that can be, None where the user wants it otherwise."""
    train = job.config.train
    if train.device != "cuda" or train.ends != "auto" or train.weights not in ("auto", "int8"):
        return None
    return _with(job, ends="int8", weights="int8")


def _smaller_batch(
    job: Job, smaller: Callable[[int], tuple[Config, list[str]]], notes: list[str]
) -> tuple[Job, list[str]]:
    """The largest batch, halved as often as it takes, that fits; the same job where none does."""
    sizes = [job.rows >> halved for halved in range(1, job.rows.bit_length())]

    def of(rows: int) -> tuple[Job, list[str]]:
        config, said = smaller(rows)
        return replace(job, config=config, rows=rows), said

    def fits(rows: int) -> bool:
        return any(_fits_at_all(way, job.card.usable_bytes) for way in _forms(of(rows)[0]))

    for rows in sizes if sizes and fits(1) else []:
        less, said = of(rows)
        if fits(rows):
            why = f"instead of {job.rows}, which do not fit on {job.card.name}"
            return less, [f"batch {rows}seq {why}", *said]
    return job, notes


def _about_sums(job: Job, choice: Choice) -> list[str]:
    if choice.sums == "fp32":
        return []
    where = f"{choice.sums} sums of gradients"
    if choice.sums == "host":
        where = "sums of gradients in host memory"
    return [f"{where}{INSTEAD}fp32 ones on the card, which do not fit"]


def _about_inputs(job: Job, choice: Choice) -> list[str]:
    if choice.boundaries == "keep" or choice.update == "layer-major":
        return []
    return [f"block inputs in host memory{INSTEAD}on the card, where they do not fit"]


def _plan(job: Job, choice: Choice, rows: list[Candidate], notes: list[str]) -> Plan:
    """The plan of this choice, rehearsed as a whole."""
    config, card, memory = job.config, job.card, job.memory(choice)
    rows = [_exact(row, memory, card) if row.choice == choice else row for row in rows]
    rows = [replace(row, quality=quality(kind_of(row.choice), job.model)) for row in rows]
    filled = _filled(config, choice, job.model)
    speed = estimate(job.timed(choice), card)
    if config.train.hours is not None and speed is not None:
        filled, note = within_hours(filled, config.train.hours, speed, job.model)
        notes = [*notes, note]
    if config.optimizer.method == "auto" and memory.reserved <= card.usable_bytes:
        notes = [*notes, f"method {choice.method}: the best published quality that fits"]
    notes = [*notes, *_said(config, filled, job.model)]
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


def search(job: Job, room: int) -> tuple[list[Candidate], Choice | None]:
    """(rows of the table, the best choice that fits in `room`, if any)."""
    best: Found | None = None
    rejected: dict[str, Candidate] = {}
    for family in families(job.config, job.model):
        if best is not None and quality(family.best, job.model).rung > best.order[0]:
            break
        found = _best_of(job, family, room, best)
        if found is None:
            row = _rejected(job, family, room)
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


def _best_of(job: Job, family: Family, room: int, than: Found | None = None) -> Found | None:
    """The best settings of a family that fit; if worse than those of `than`, any that fit.

    Ways are compared by what is cheap to know, and only the fastest settings of the best sought.
    """
    if _least_persistent(job, family.least) > room:
        return None
    reached = [_reach(job, family, way, room) for way in _ways(job, family.least)]
    found: Found | None = None
    for reach in sorted((each for each in reached if each), key=lambda each: each.order):
        rival = found or than
        if rival is not None and reach.order > rival.order[:2]:
            return found or Found(reach.smallest, (*reach.order, sys.maxsize, 0))
        fastest = _fastest_in(job, reach, room)
        if fastest is not None and (found is None or fastest.order < found.order):
            found = fastest
    return found


def _ways(job: Job, kind: Kind) -> list[Way]:
    return ways(job.config, kind, job.rows)


def _least_persistent(job: Job, kind: Kind) -> int:
    """Bytes that are always on the device, in the way that leaves most of them on the host."""
    places = {(way.place, way.blocks) for way in _ways(job, kind)}
    return min(job.persistent(kind, *each) for each in places)


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
        return [each for each in _smallest(job, kinds[index], way) if job.fits(each, room)]

    top = _last(len(kinds), lambda index: bool(fitting(index)))
    if top is None:
        return None
    rung, low = quality(kinds[top], job.model).rung, top
    if job.config.optimizer.rank == "auto":  # a rank that was asked for is not given up for speed
        low = next(i for i in range(top + 1) if quality(kinds[i], job.model).rung <= rung)
    early = way.update in MOVE_EARLY
    return Reach(kinds[low : top + 1], way, (rung, early), fitting(top)[0])


def _fastest_in(job: Job, reach: Reach, room: int) -> Found | None:
    """The fastest settings with the least rank, then the largest rank for which they leave room."""
    settings = _fastest(job, reach.kinds[0], reach.way, room)
    if settings is None:
        return None

    def of(index: int) -> Choice:
        return replace(settings, rank=reach.kinds[index].rank)

    choice = of(_last(len(reach.kinds), lambda index: job.fits(of(index), room)) or 0)
    coarse = SUM_FORMATS.index(choice.sums)
    return Found(choice, (*reach.order, coarse, _speed_class(job, settings)))


def _speed_class(job: Job, choice: Choice) -> int:
    """Of the time per update: smaller is faster."""
    return math.floor(math.log(job.seconds(choice)) / math.log(SPEED_CLASS))


def _last(count: int, fits: Callable[[int], bool]) -> int | None:
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


def _smallest(job: Job, kind: Kind, way: Way) -> list[Choice]:
    """The smallest settings of a kind in that mode: single sequences, whose gradients are summed,
    or the whole batch at once, which needs no sums; whichever are allowed."""
    fixed = job.config.train.micro_batch
    sizes = {job.rows} if way.update == "fused" else {1, job.rows}
    sizes = sizes if fixed == "auto" else {settled(fixed)}
    settings = _recompute(job, way, "full"), _logits(job, "recompute")
    return [job.choice(kind, way, *settings, size) for size in sorted(sizes)]


def _recompute(job: Job, way: Way, wanted: str) -> str:
    """What is wanted, unless the user fixed it, or layer-major order does."""
    if way.update == "layer-major":
        return "full"
    fixed = job.config.train.recompute
    return wanted if fixed == "auto" else fixed


def _logits(job: Job, wanted: Logits) -> Logits:
    fixed = job.config.train.logits
    return wanted if fixed == "auto" else settled(fixed)


def _fastest(job: Job, kind: Kind, way: Way, room: int) -> Choice | None:
    """The fastest micro-batch and recomputation that fit."""
    best: Choice | None = None
    hopes = [_hope(job, kind, way, size) for size in _micro_batches(job, kind, way, room)]
    for hope in sorted(hopes, key=job.seconds):
        if best is not None and job.seconds(hope) >= job.seconds(best):
            break
        found = _least_recomputed(job, hope, room)
        if found is not None:
            best = found if best is None else min(best, found, key=job.seconds)
    return best


def _hope(job: Job, kind: Kind, way: Way, micro: int) -> Choice:
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

    def fits(size: int) -> bool:
        settings = _recompute(job, way, "full"), _logits(job, "recompute")
        return job.fits(job.choice(kind, way, *settings, size), room)

    most = min(_most_rows(job), job.rows - 1)
    powers = {size for power in range(20) for size in (2**power, 3 * 2**power)}
    sizes = sorted(size for size in powers if size <= most)
    last = _last(len(sizes), lambda index: fits(sizes[index])) if sizes else None
    whole = [job.rows] if job.rows <= _most_rows(job) or last is None else []
    return [*(sizes[: last + 1] if last is not None else []), *whole]


def _most_rows(job: Job) -> int:
    return max(1, MAX_TOKENS[job.config.train.device] // job.seq_len)


def _least_recomputed(job: Job, hope: Choice, room: int) -> Choice | None:
    """As `hope`, which recomputes least, or with as little more recomputed as fits."""
    if job.fits(hope, room):
        return hope
    ways = (
        [hope] if job.config.train.logits != "auto" else [hope, replace(hope, logits="recompute")]
    )
    found = [_fewest_blocks(job, way, room) for way in ways]
    return min((each for each in found if each is not None), key=job.seconds, default=None)


def _fewest_blocks(job: Job, choice: Choice, room: int) -> Choice | None:
    """With as few blocks recomputed as fit: the upper blocks keep everything first."""
    if job.config.train.recompute != "auto" or choice.update == "layer-major":
        return choice if job.fits(choice, room) else None
    blocks = job.model.num_hidden_layers

    def at(keep: int, attn: int) -> Choice:
        return replace(choice, recompute=in_words(keep, attn, blocks))

    def fitting(of: Callable[[int], Choice], most: int) -> int | None:
        return _last(most + 1, lambda count: job.fits(of(count), room))

    more = fitting(lambda count: at(1 + count, 0), blocks - 1)
    if more is None:
        return None
    keep = 1 + more
    attn = fitting(lambda count: at(keep, count), blocks - keep) or 0
    alone = fitting(lambda count: at(1, count), blocks - 1) or 0
    return min(at(keep, attn), at(1, alone), key=job.seconds)


def least(job: Job) -> Choice:
    """The smallest settings of all: of those with the fewest persistent bytes, the lowest peak."""
    found = families(job.config, job.model)
    coarsest = weight_formats(job.config)[-1]
    kinds = [family.least for family in found if family.weights == coarsest]
    few = sorted(kinds, key=job.persistent)[:_SMALLEST_TRIED]
    return min(_all_smallest(job, few), key=job.tensors)


def _all_smallest(job: Job, kinds: Iterable[Kind]) -> list[Choice]:
    """With the coarsest sums that are tried."""
    coarsest = [replace(kind, sums=sum_formats(job.config, kind)[-1]) for kind in kinds]
    return [
        choice
        for kind in coarsest
        for way in _ways(job, kind)
        for choice in _smallest(job, kind, way)
    ]


def _rejected(job: Job, family: Family, room: int) -> Candidate:
    """The row of a family of which nothing fits."""
    if _least_persistent(job, family.least) > room:
        return _too_large(job, _all_smallest(job, [family.least])[0], room)
    return _too_large(job, min(_all_smallest(job, [family.least]), key=job.tensors), room)


def _too_large(job: Job, least: Choice, room: int) -> Candidate:
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


def _others(job: Job, choice: Choice, rows: list[Candidate], room: int) -> list[Candidate]:
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
        found = _best_of(job, family, room)
        if found is not None:
            return Candidate(found.choice, True, job.peak(found.choice), reason="next in quality")
    rejected = [_rejected(job, family, room) for family in method]
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
        (job.seconds(_hope(job, family.least, way, min(job.rows, _most_rows(job)))), family, way)
        for family in tried
        for way in _ways(job, family.least)
        if job.persistent(family.least, way.place, way.blocks) <= room
    ]
    best = choice
    for hope, family, way in sorted(hopes, key=lambda each: each[0])[:_FASTEST_TRIED]:
        if hope >= job.seconds(best):
            break
        found = _fastest(job, family.least, way, room)
        if found is not None:
            best = min(best, found, key=job.seconds)
    return best


def _fits_at_all(job: Job, room: int) -> bool:
    kinds = [family.least for family in families(job.config, job.model)]
    return any(
        job.fits(choice, room)
        for kind in kinds
        if _least_persistent(job, kind) <= room
        for choice in _all_smallest(job, [kind])
    )


def _filled(config: Config, choice: Choice, model: ModelConfig) -> Config:
    """The configuration with everything that the planner chose written down."""
    kind = kind_of(choice)
    optimizer = kind.optimizer(config.optimizer, model.parameters)
    optimizer = optimizer.model_copy(
        update={
            "lr": learning_rate(optimizer, model.parameters),
            "weight_decay": weight_decay(optimizer, model.parameters),
            "place": choice.place,
        }
    )
    layer_major = choice.update == "layer-major"
    train = config.train.model_copy(
        update={
            "micro_batch": choice.micro_batch,
            "update": choice.update,
            "recompute": choice.recompute,
            "logits": choice.logits,
            "clip": "off" if choice.clip is None else choice.clip,
            "weights": choice.weights,
            "ends": choice.ends,
            "sums": choice.sums,
            "boundaries": choice.boundaries,
            **({"blocks": choice.blocks} if layer_major else {}),
        }
    )
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def _said(config: Config, filled: Config, model: ModelConfig) -> list[str]:
    """What nobody gave and memory does not decide: rate, clipping, the method's own arguments."""
    method = filled.optimizer.method
    spec = method_spec(method)
    size = spec.recipe_size(model.parameters)
    recipe = f"the sheet of {method} ({'for all sizes' if size == 'any' else f'{size} recipe'})"
    said = [
        f"method {method}: lowmem's own; the one of {package_of(entry)} is refused"
        for entry in refused(METHODS)
        if entry.name == method in METHODS
    ]
    if config.train.compile:
        said.append("compile: planned as if it were off, which takes as much or more")
    if config.train.matmul != "exact":
        said.append(f"matmul {config.train.matmul}: memory as it is, time as with exact products")
    if config.optimizer.lr == "auto":
        said.append(f"lr {filled.optimizer.lr:g}: from {recipe}, {spec.source}")
    if config.optimizer.weight_decay == "auto" and filled.optimizer.weight_decay:
        said.append(f"weight-decay {filled.optimizer.weight_decay:g}: from {recipe}")
    if config.train.clip == "auto":
        early = f"{filled.train.update} updates cannot be clipped"
        why = early if filled.train.clip == "off" else "the usual limit"
        said.append(f"clip {filled.train.clip}: {why}")
    sheet = sheet_settings(method, model.parameters, config.optimizer.options)
    own = {k: v for k, v in spec.arguments.items() if v is not None}
    rest = {k: v for k, v in own.items() if k not in ("rank", "states", *filled.optimizer.options)}
    said += [f"{_words(sheet)}: from {recipe}"] if sheet else []
    return [*said, *([f"{_words(rest)}: defaults of {method}"] if rest else [])]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
