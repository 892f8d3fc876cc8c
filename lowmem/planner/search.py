"""Fit a configuration to a card: the best kind that fits, and why the others were not taken.

Kinds are tried in the order of `candidates.py`. A sum of weights, states, held gradients and block
inputs rejects most of what cannot fit; of a method that nobody named the smallest kind speaks for
all. The rest is estimated (`job.py`). The winner is rehearsed whole, and if that says more than was
expected the search learns it and looks again.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem.config.schema import Config, Level, ModelConfig, UpdateMode, settled
from lowmem.optim.assign import learning_rate
from lowmem.optim.methods import METHODS, method_spec
from lowmem.optim.methods.third_party import package_of, refused
from lowmem.planner.candidates import (
    Kind,
    kinds,
    levels,
    modes,
    quality,
    rank_share,
    sheet_settings,
    sums_projected,
)
from lowmem.planner.fixes import fixes
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Candidate, Card, Choice, Memory, Plan
from lowmem.planner.speed import Timed, estimate, require_rates, within_hours
from lowmem.units import format_bytes

MAX_TOKENS = {"cuda": 32768, "cpu": 4096}  # per micro-batch: more brings no speed
ATTEMPTS = 8
_SECANTS = 4
_BESIDE = 2  # methods shown after the choice
_RIVALS = 8  # rehearsed to say which is smallest when nothing fits
ENOUGH_TOKENS = 2048  # below that matmuls are slow, and recomputation is the better price


def make_plan(config: Config, card: Card, notes: list[str]) -> Plan:
    """The plan of a settled configuration; `Plan.fits` says whether anything fits.

    ConfigError: settings that contradict one another.
    """
    if config.train.hours is not None:
        require_rates(card, settled(config.train.weights))
    job = Job.of(config, card)
    for _ in range(ATTEMPTS):
        rows, choice = search(job, card.usable_bytes)
        memory = job.memory(choice)
        if memory.reserved <= card.usable_bytes or not any(row.fits for row in rows):
            break
        job.learn(choice, memory)  # and look again, at this choice's neighbours
    rows = [_exact(row, memory, card) if row.choice == choice else row for row in rows]
    rows = [replace(row, quality=quality(kind_of(row.choice), job.model)) for row in rows]
    filled = _filled(config, choice, job.model)
    speed = estimate(Timed(job.model, filled.optimizer, choice, job.rows, job.seq_len), card)
    if config.train.hours is not None and speed is not None:
        filled, note = within_hours(filled, config.train.hours, speed, job.model)
        notes = [*notes, note]
    if config.optimizer.method == "auto" and memory.reserved <= card.usable_bytes:
        notes = [*notes, f"method {choice.method}: the best published quality that fits"]
    notes = [*notes, *_said(config, filled, job.model)]
    cost = quality(kind_of(choice), job.model)
    plan = Plan(filled, card, choice, memory, rows, [], notes, speed, cost)
    return plan if plan.fits else replace(plan, fixes=list(fixes(job, choice, memory)))


def _exact(row: Candidate, memory: Memory, card: Card) -> Candidate:
    """The row of the choice, by its rehearsed peak instead of the estimate."""
    excess = memory.reserved - card.usable_bytes
    reason = "chosen" if excess <= 0 else f"{format_bytes(excess)} too much"
    return replace(row, fits=excess <= 0, peak_bytes=memory.reserved, bound=False, reason=reason)


def search(job: Job, room: int) -> tuple[list[Candidate], Choice]:
    """(rows of the table, the choice): the first kind that fits in `room`, or the smallest.

    Behind the choice stand the methods that come next in quality.
    """
    rows: list[Candidate] = []
    chosen: Choice | None = None
    hopeless: set[str] = set()
    tried = kinds(job.config, job.model)
    smallest = _smallest_kinds(job, tried)
    for kind in tried:
        if kind.method in hopeless:
            continue
        least = smallest.get(kind.method)
        beyond = None if least is None else _beyond(job, least, room)
        rows.append(beyond or _best(job, kind, room))
        if rows[-1].fits:
            chosen = rows[-1].choice
            rows += _besides(job, tried, rows, room)
            break
        if beyond or (least is not None and not _any_fits(job, least, room)):
            hopeless.add(kind.method)
    if chosen is None:
        chosen = _least(job)
        row = _too_large(job, chosen, room)
        rows = [row if kind_of(old.choice) == kind_of(chosen) else old for old in rows]
    return rows, chosen


def _smallest_kinds(job: Job, tried: list[Kind]) -> dict[str, Kind]:
    """The smallest kind of each method, where the planner may choose it: least rank, 8-bit moments.

    Where that does not fit nothing of its method does. Of a method that the user named every kind
    is looked at.
    """
    if job.config.optimizer.method != "auto":
        return {}

    def size(kind: Kind) -> tuple[float, bool]:
        return rank_share(kind.rank, job.model) or 0.0, kind.states != "8bit"

    return {kind.method: kind for kind in sorted(tried, key=size, reverse=True)}


def _beyond(job: Job, least: Kind, room: int) -> Candidate | None:
    """The row of a method whose smallest kind needs more than `room` by the cheap bound alone."""
    choice = min(_all_smallest(job, least), key=job.bound)
    bound = job.bound(choice)
    if bound <= room:
        return None
    more = "" if job.persistent(choice) > room else ", gradients and block inputs"
    reason = f"{format_bytes(bound - room)} too much in weights, states and sums{more} alone"
    return Candidate(choice, False, bound, bound=True, reason=reason)


def _any_fits(job: Job, kind: Kind, room: int) -> bool:
    return any(job.fits(choice, room) for choice in _all_smallest(job, kind))


def _all_smallest(job: Job, kind: Kind) -> list[Choice]:
    allowed = modes(job.config, kind, job.rows)
    return [choice for mode in allowed for choice in _smallest(job, kind, mode)]


def _besides(job: Job, tried: list[Kind], rows: list[Candidate], room: int) -> list[Candidate]:
    """The next methods in order, with the settings of the last row, which is the choice."""
    shown = {row.choice.method for row in rows}
    left: dict[str, Kind] = {}
    for kind in tried:
        if kind.method not in shown:
            left.setdefault(kind.method, kind)
    return [_beside(job, kind, rows[-1].choice, room) for kind in list(left.values())[:_BESIDE]]


def _least(job: Job) -> Choice:
    """The smallest settings of all: of those with the fewest persistent bytes, the lowest peak."""
    tried = kinds(job.config, job.model)
    smallest = list(_smallest_kinds(job, tried).values())
    options = [choice for kind in smallest or tried for choice in _all_smallest(job, kind)]
    return min(sorted(options, key=job.persistent)[:_RIVALS], key=job.peak)


def _best(job: Job, kind: Kind, room: int) -> Candidate:
    """The fastest settings of a kind that fit, or its smallest with what is missing."""
    allowed = modes(job.config, kind, job.rows)
    for mode in allowed:
        found = _fastest(job, kind, mode, room)
        if found is not None:
            return Candidate(found, True, job.peak(found), reason="chosen")
    smallest = _all_smallest(job, kind)
    if job.config.optimizer.method == "auto":  # one kind of many: a row without rehearsals
        return _too_large(job, min(smallest, key=job.bound), room)
    rows = [_too_large(job, choice, room) for choice in smallest]
    return min(rows, key=lambda row: (row.bound, row.peak_bytes))


def _too_large(job: Job, least: Choice, room: int) -> Candidate:
    """A row for settings that do not fit although there are no smaller ones."""
    bound = job.persistent(least)
    if bound > room:
        reason = f"{format_bytes(bound - room)} too much in weights, states and sums alone"
        return Candidate(least, False, bound, bound=True, reason=reason)
    peak = job.peak(least)
    where = f"even with micro-batch {least.micro_batch} and recompute {least.recompute}"
    return Candidate(least, False, peak, reason=f"{format_bytes(peak - room)} too much {where}")


def _beside(job: Job, kind: Kind, chosen: Choice, room: int) -> Candidate:
    """A kind that comes after the choice, with the choice's settings."""
    mode = chosen.update
    if mode == "fused+subspace" and not sums_projected(kind, job.config.optimizer):
        mode = "unfused"
    settings = job.choice(kind, mode, chosen.recompute, chosen.micro_batch)
    bound = job.bound(settings)
    if bound > room:
        return Candidate(settings, False, bound, bound=True, reason="does not fit so")
    peak = job.peak(settings)
    fits = peak <= room
    reason = "fits; comes after the choice in published quality" if fits else "does not fit so"
    return Candidate(settings, fits, peak, reason=reason)


def _smallest(job: Job, kind: Kind, mode: UpdateMode) -> list[Choice]:
    """The smallest settings of a kind in that mode: single sequences, whose gradients are summed
    in float32, or the whole batch at once, which needs no sums; whichever are allowed."""
    fixed = job.config.train.micro_batch
    sizes = {job.rows} if mode == "fused" else {1, job.rows}
    sizes = sizes if fixed == "auto" else {settled(fixed)}
    return [job.choice(kind, mode, levels(job.config)[-1], size) for size in sorted(sizes)]


def _fastest(job: Job, kind: Kind, mode: UpdateMode, room: int) -> Choice | None:
    """The settings with the least recomputation whose micro-batch is large enough."""
    smallest = _smallest(job, kind, mode)
    if mode == "fused" and not job.fits(smallest[0], room):
        return None
    best: Choice | None = None
    for level in levels(job.config):
        found = _largest_micro_batch(job, kind, mode, level, room)
        if found is None:
            continue
        if best is None or found.micro_batch > best.micro_batch:
            best = found
        if found.accumulate == 1 or found.micro_batch * job.seq_len >= ENOUGH_TOKENS:
            break
    return best


def _largest_micro_batch(
    job: Job, kind: Kind, mode: UpdateMode, level: Level, room: int
) -> Choice | None:
    """The peak is nearly affine in the micro-batch: a few secants find where it meets the room."""
    fixed = job.config.train.micro_batch
    if fixed != "auto" or mode == "fused":
        only = job.choice(kind, mode, level, job.rows if fixed == "auto" else settled(fixed))
        return only if job.fits(only, room) else None
    cap = max(1, min(job.rows, MAX_TOKENS[job.config.train.device] // job.seq_len))
    top = job.choice(kind, mode, level, cap)
    if job.fits(top, room):
        return top
    low = job.choice(kind, mode, level, 1)
    if not job.fits(low, room):
        whole = job.choice(kind, mode, level, job.rows)  # needs no float32 sums
        return whole if job.fits(whole, room) else None
    for _ in range(_SECANTS):
        share = (room - job.peak(low)) / (job.peak(top) - job.peak(low))
        micro = low.micro_batch + int(share * (top.micro_batch - low.micro_batch))
        guess = job.choice(kind, mode, level, micro)
        if guess.micro_batch in (low.micro_batch, top.micro_batch):
            break
        if job.fits(guess, room):
            low = guess
        else:
            top = guess
    return low


def _filled(config: Config, choice: Choice, model: ModelConfig) -> Config:
    """The configuration with everything that the planner chose written down."""
    kind = kind_of(choice)
    optimizer = kind.optimizer(config.optimizer, model.parameters)
    optimizer = optimizer.model_copy(update={"lr": learning_rate(optimizer, model.parameters)})
    train = config.train.model_copy(
        update={
            "micro_batch": choice.micro_batch,
            "update": choice.update,
            "recompute": choice.recompute,
            "logits": choice.logits,
            "clip": "off" if choice.clip is None else choice.clip,
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
    if config.optimizer.lr == "auto":
        said.append(f"lr {filled.optimizer.lr:g}: from {recipe}, {spec.source}")
    if config.train.clip == "auto":
        why = "fused updates cannot be clipped" if filled.train.clip == "off" else "the usual limit"
        said.append(f"clip {filled.train.clip}: {why}")
    sheet = sheet_settings(method, model.parameters, config.optimizer.options)
    own = {k: v for k, v in spec.arguments.items() if v is not None}
    rest = {k: v for k, v in own.items() if k not in ("rank", "states", *filled.optimizer.options)}
    said += [f"{_words(sheet)}: from {recipe}"] if sheet else []
    return [*said, *([f"{_words(rest)}: defaults of {method}"] if rest else [])]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
