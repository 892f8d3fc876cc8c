"""Fit a configuration to a card: the best kind that fits, and why the others were not taken.

Kinds are tried in the order of `candidates.py`. A sum of weights, states and held gradients
rejects most of what cannot fit; the rest is rehearsed with three and four blocks and extended to
the model's depth. The winner is rehearsed whole, its allocations are replayed through the
allocator, and the search repeats with less room if that says more than was expected.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, Level, ModelConfig, UpdateMode, settled
from lowmem.errors import ConfigError
from lowmem.kernels.attention import choose_backend
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer, learning_rate, takes_rank
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.allocator import replay
from lowmem.planner.candidates import Kind, clip_of, kinds, levels, modes
from lowmem.planner.plan import Candidate, Card, Choice, Fix, Memory, Plan
from lowmem.planner.rehearse import DTYPES, GRANULE, rehearse
from lowmem.units import MIB, format_bytes

CUBLAS_WORKSPACE = 2 * 8_519_680  # one per thread that multiplies; planner.md section 7.1
HOPPER_WORKSPACE = 2 * 33_554_432
MAX_TOKENS = {"cuda": 32768, "cpu": 4096}  # per micro-batch: more brings no speed
ENOUGH_TOKENS = 2048  # below that matmuls are slow, and recomputation is the better price
_SHALLOW = (3, 4)  # blocks of the two estimating rehearsals


def make_plan(config: Config, card: Card, notes: list[str]) -> Plan:
    """The plan of a settled configuration; `Plan.fits` says whether anything fits.

    ConfigError: settings that contradict one another.
    """
    job = Job.of(config, card)
    room = card.usable_bytes
    for _ in range(4):
        rows, choice = search(job, room)
        memory = job.memory(choice)
        excess = memory.reserved - card.usable_bytes
        if excess <= 0 or not any(row.fits for row in rows):
            break
        room -= excess  # the estimate was too low by that much
    plan = Plan(
        _filled(config, choice, job.model), card, choice, memory, rows, [], [*notes, *_said(config)]
    )
    return plan if plan.fits else replace(plan, fixes=list(_fixes(job, choice, memory)))


@dataclass
class Job:
    """What is planned: a configuration on a card, with estimates that were made already."""

    config: Config
    card: Card
    model: ModelConfig
    rows: int
    seq_len: int
    attention: str
    _tensors: dict[tuple[Choice, int], int] = field(default_factory=dict)

    @staticmethod
    def of(config: Config, card: Card) -> "Job":
        from lowmem.config.defaults import rows_of

        model = resolve_model(config.model, Path.cwd())
        seq_len = settled(config.data.seq_len)
        rows = rows_of(config.train.batch, seq_len)
        micro = config.train.micro_batch
        if micro != "auto" and settled(micro) > rows:
            raise ConfigError(
                f"train.micro_batch = {micro} is more than the batch of {rows} sequences",
                "a micro-batch is a part of the batch",
                f"--micro-batch {rows}, or a larger --batch",
            )
        dtype = DTYPES[settled(config.train.weights)]
        attention = choose_backend("auto", torch.device(config.train.device), dtype, model.head_dim)
        return Job(config, card, model, rows, seq_len, attention)

    @property
    def workspace(self) -> int:
        """Bytes that libraries hold throughout a run on this device."""
        if self.config.train.device == "cpu":
            return 0
        hopper = any(name in self.card.name.lower() for name in ("h100", "h200"))
        return HOPPER_WORKSPACE if hopper else CUBLAS_WORKSPACE

    def choice(self, kind: Kind, mode: UpdateMode, level: Level, micro: int) -> Choice:
        """These settings as a Choice, with micro-batches made equal in size."""
        accumulate = math.ceil(self.rows / micro)
        return Choice(
            kind.method,
            kind.rank,
            kind.states,
            settled(self.config.train.weights),
            mode,
            level,
            micro if self.config.train.micro_batch != "auto" else math.ceil(self.rows / accumulate),
            accumulate,
            clip_of(self.config, mode),
        )

    def persistent(self, choice: Choice) -> int:
        """Weights, states and held sums: a lower bound, from the method's own `init`."""
        one, two = (self._persistent(choice, blocks) for blocks in (1, 2))
        return one + (self.model.num_hidden_layers - 1) * (two - one)

    def _persistent(self, choice: Choice, blocks: int) -> int:
        model = self.model.model_copy(update={"num_hidden_layers": blocks})
        llama = Llama(model, dtype=DTYPES[choice.weights], device="meta", attention=self.attention)
        weights = dict(llama.named_parameters())
        optimizer = build_optimizer(
            kind_of(choice).optimizer(self.config.optimizer),
            weights,
            llama.roles(),
            mode=choice.update,
            seed=0,
        )
        total = sum(_rounded(weight.nbytes) for weight in weights.values())
        total += sum(_rounded(value.nbytes) for _, value in optimizer.state_tensors())
        if choice.accumulate > 1:
            total += sum(_rounded(4 * count) for count in _held(optimizer, choice.update))
        return total + self.workspace

    def peak(self, choice: Choice) -> int:
        """Estimated bytes that the allocator will have reserved at the peak."""
        depth = self.model.num_hidden_layers
        if depth <= _SHALLOW[1]:
            return self._reserved(self._rehearsed(choice, depth))
        few, more = (self._rehearsed(choice, blocks) for blocks in _SHALLOW)
        return self._reserved(few + (depth - _SHALLOW[0]) * (more - few))

    def _rehearsed(self, choice: Choice, blocks: int) -> int:
        key = (choice, blocks)
        if key not in self._tensors:
            self._tensors[key] = rehearse(
                self.model,
                kind_of(choice).optimizer(self.config.optimizer),
                choice,
                self.seq_len,
                attention=self.attention,
                workspace=self.workspace,
                blocks=blocks,
            ).tensors
        return self._tensors[key]

    def _reserved(self, tensors: int) -> int:
        if self.config.train.device == "cpu":
            return tensors
        return round(1.003 * tensors) + 40 * MIB  # whole pages; the replay of the winner decides

    def memory(self, choice: Choice) -> Memory:
        """The exact peak: the whole model rehearsed, its allocations replayed."""
        full = rehearse(
            self.model,
            kind_of(choice).optimizer(self.config.optimizer),
            choice,
            self.seq_len,
            attention=self.attention,
            workspace=self.workspace,
        )
        if self.config.train.device == "cpu":  # the host's allocator returns what it does not use
            return Memory(full.tensors, full.tensors, full.tensors, full.parts, full.instant)
        peaks = replay(full.events, expandable=True)
        return Memory(full.tensors, peaks.allocated, peaks.reserved, full.parts, full.instant)


def kind_of(choice: Choice) -> Kind:
    return Kind(choice.method, choice.rank, choice.states)


def _rounded(count: int) -> int:
    return -(-count // GRANULE) * GRANULE


def _held(optimizer: Optimizer, mode: UpdateMode) -> Iterator[int]:
    """Elements held between micro-batches, per weight."""
    for slot in optimizer.slots.values():
        whole = mode == "unfused" or slot.method.needs.full_gradient
        yield (slot.weight if whole else slot.method.compress(slot.weight, slot.state)).numel()


def search(job: Job, room: int) -> tuple[list[Candidate], Choice]:
    """(rows of the table, the choice): the first kind that fits in `room`, or the smallest."""
    rows: list[Candidate] = []
    chosen: Choice | None = None
    for kind in kinds(job.config, job.model):
        if chosen is not None:
            if not any(row.choice.method == kind.method and row.fits for row in rows):
                rows.append(_beside(job, kind, chosen, room))
            continue
        row = _best(job, kind, room)
        rows.append(row)
        if row.fits:
            chosen = row.choice
    if chosen is None:
        chosen = min((row.choice for row in rows), key=job.peak)
    return rows, chosen


def _best(job: Job, kind: Kind, room: int) -> Candidate:
    """The fastest settings of a kind that fit, or its smallest with what is missing."""
    failed: list[Candidate] = []
    for mode in modes(job.config, kind, job.rows):
        found = _fastest(job, kind, mode, room)
        if found is not None:
            return Candidate(found, True, job.peak(found), reason="chosen")
        failed.append(_too_large(job, _least(job, kind, mode), room))
    return min(failed, key=lambda row: row.peak_bytes)


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
    if mode == "fused+subspace" and not takes_rank(kind.method):
        mode = "unfused"
    settings = job.choice(kind, mode, chosen.recompute, chosen.micro_batch)
    peak = job.peak(settings)
    fits = peak <= room
    reason = "fits; comes after the choice in published quality" if fits else "does not fit so"
    return Candidate(settings, fits, peak, reason=reason)


def _least(job: Job, kind: Kind, mode: UpdateMode) -> Choice:
    """The smallest settings of a kind in that mode."""
    micro = job.rows if mode == "fused" else 1
    if job.config.train.micro_batch != "auto":
        micro = settled(job.config.train.micro_batch)
    return job.choice(kind, mode, levels(job.config)[-1], micro)


def _fastest(job: Job, kind: Kind, mode: UpdateMode, room: int) -> Choice | None:
    """The settings with the least recomputation whose micro-batch is large enough."""
    if job.persistent(_least(job, kind, mode)) > room:
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
    """The peak is affine in the micro-batch but for rounding: guess, then step down."""
    fixed = job.config.train.micro_batch
    if fixed != "auto" or mode == "fused":
        only = job.choice(kind, mode, level, job.rows if fixed == "auto" else settled(fixed))
        return only if job.peak(only) <= room else None
    cap = max(1, min(job.rows, MAX_TOKENS[job.config.train.device] // job.seq_len))
    top = job.choice(kind, mode, level, cap)
    if job.peak(top) <= room:
        return top
    least = job.peak(job.choice(kind, mode, level, 1))
    if least > room:
        return None
    slope = (job.peak(top) - least) / max(1, top.micro_batch - 1)
    micro = min(cap - 1, 1 + int((room - least) / max(slope, 1)))
    while micro > 1 and job.peak(job.choice(kind, mode, level, micro)) > room:
        micro -= max(1, micro // 8)
    return job.choice(kind, mode, level, max(1, micro))


def _filled(config: Config, choice: Choice, model: ModelConfig) -> Config:
    """The configuration with everything that the planner chose written down."""
    kind = kind_of(choice)
    optimizer = kind.optimizer(config.optimizer)
    optimizer = optimizer.model_copy(update={"lr": learning_rate(optimizer, model.parameters)})
    train = config.train.model_copy(
        update={
            "micro_batch": choice.micro_batch,
            "update": choice.update,
            "recompute": choice.recompute,
            "clip": "off" if choice.clip is None else choice.clip,
        }
    )
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def _said(config: Config) -> list[str]:
    """What the planner chose although it is a matter of taste."""
    said = []
    if config.optimizer.lr == "auto":
        said.append("lr: from the method's sheet; another with --lr")
    if config.train.clip == "auto":
        said.append("clip: norm 1.0 where the norm is known in time, else off")
    return said


def _fixes(job: Job, choice: Choice, memory: Memory) -> Iterator[Fix]:
    """Changes that help, the largest gain first; at most four."""
    found = []
    for flags, other in _variations(job, choice):
        peak = job.peak(other)
        if peak < memory.reserved:
            fits = peak <= job.card.usable_bytes
            found.append(Fix(flags, memory.reserved - peak, fits))
    yield from sorted(found, key=lambda fix: -fix.saves)[:4]


def _variations(job: Job, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """(flags, choice with that one change)."""
    rank = max(4, job.model.hidden_size // 8)
    mode = "fused+subspace" if choice.update == "unfused" else choice.update
    galore = replace(choice, method="galore", rank=rank, states="8bit", update=mode)
    yield f"--method galore --rank {rank} --states 8bit", galore
    if choice.states != "8bit":
        if choice.method == "adamw":
            yield "--method adam8bit", replace(choice, method="adam8bit", states="8bit")
        else:
            yield "--states 8bit", replace(choice, states="8bit")
    if choice.update == "unfused" and takes_rank(choice.method):
        yield "--update fused+subspace", replace(choice, update="fused+subspace")
    if choice.recompute != "full":
        yield "--recompute full", replace(choice, recompute="full")
    if choice.micro_batch > 1 and choice.update != "fused":
        yield "--micro-batch 1", replace(choice, micro_batch=1, accumulate=job.rows)
    if choice.weights == "fp32" and job.config.train.device == "cuda":
        yield "--weights bf16", replace(choice, weights="bf16")
