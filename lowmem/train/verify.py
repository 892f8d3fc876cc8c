"""`lowmem plan --verify`: real updates of a plan, measured beside what was rehearsed.

    verification = verify(plan, before=SmiReading.all())
    verification.rows            # planned and measured by segment
    verification.calibration     # what the next plan takes from it

What runs is what `train` runs: `build`, `gather`, `step`, `evaluate`, `checkpoint.save`; only the
text is random. On CUDA the allocator is capped at the plan's budget, so a plan for a small card is
proven inside that budget on a larger one. On the CPU tensors are counted by the profiler.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from lowmem import __version__
from lowmem.config.schema import Config, settled
from lowmem.data.cache import cache_home
from lowmem.data.shards import Corpus
from lowmem.errors import HardwareError
from lowmem.kernels.blockwise import lookup_tables
from lowmem.kernels.random_normal import lookup_table
from lowmem.model.llama import Llama
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.allocator import Allocator, Peaks, expandable_segments
from lowmem.planner.calibration import Calibration, Row, now
from lowmem.planner.hardware import SmiReading, available_memory, processor
from lowmem.planner.job import Job
from lowmem.planner.plan import Plan
from lowmem.planner.rehearse import (
    EVALUATE,
    GATHER,
    PERSISTENT,
    STEP,
    Rehearsal,
    Segment,
    bytes_by_part,
    persistent_tensors,
    rehearse,
    tables,
)
from lowmem.train import checkpoint
from lowmem.train.cap import capped
from lowmem.train.evaluate import evaluate
from lowmem.train.guard import told_out_of_memory
from lowmem.train.loop import build
from lowmem.train.meters import Meter, Reading, meter_of
from lowmem.train.out_of_memory import out_of_memory_table
from lowmem.train.run import Run
from lowmem.train.snapshot import Position
from lowmem.train.trial import Batch, ScratchText, scratch_gradients

BUILD, SAVE, WHOLE = "built", "save", "whole run"
UPDATES = 2
_EVALUATED = 3  # batches
_REPEATS = 4  # of a timed call between two waits for the device, so that launches overlap


@dataclass(frozen=True)
class Verification:
    """Every comparison, and what is kept for the next plan. note: what could not be checked."""

    rows: list[Row]
    calibration: Calibration
    note: str

    @property
    def is_right(self) -> bool:
        """Did the plan keep its promise in every row?"""
        return all(row.is_right for row in self.rows)


def verify(plan: Plan, before: list[SmiReading], command: str = "") -> Verification:
    """Run UPDATES updates, an evaluation and a save of a plan that fits; measure and compare.

    before: what nvidia-smi said before this process touched the card. command: for the record.
    HardwareError: this machine cannot hold the plan. OutOfMemoryError: the card could not, although
    the plan said so.
    """
    device = settled(plan.config.train.device)
    rehearsal = _rehearsed(plan)
    _require_room(plan, device)
    with capped(plan, device), tempfile.TemporaryDirectory(dir=_scratch_folder()) as folder:
        measured = _measured(plan, device, Path(folder))
        _release(device)
        rows = [*compared(plan, rehearsal, measured)]
        rates = measured_rates() if device == "cuda" else None
    if device != "cuda":
        note = "without CUDA nothing reserves memory, so reserved and device were not checked"
        return Verification(rows, _of_host(command, rows), note)
    smi = SmiReading.of_this_device(before)
    context = _context(measured, smi)
    if context is not None:
        needs = measured.reserved + context + plan.card.others
        over = needs > plan.card.total  # a context that is smaller than its preset is no mistake
        rows.append(Row(WHOLE, "device", plan.device_bytes, needs, is_promise=over))
    held = measured.readings[STEP].end - rehearsal.segments[STEP].end + plan.card.workspace
    kept = Calibration(
        date=now(),
        lowmem=__version__,
        torch=version("torch"),
        driver=smi.driver,
        name=torch.cuda.get_device_name(),
        uuid=smi.uuid,
        total=torch.cuda.get_device_properties().total_memory,
        context=context,
        workspace=held if 0 <= held <= 8 * plan.card.workspace else None,
        tflops=None if rates is None else rates[0],
        bandwidth=None if rates is None else rates[1],
        command=command,
        rows=[_record(row) for row in rows],
    )
    note = "" if context is not None else "nvidia-smi did not answer: context was not measured"
    return Verification(rows, kept, note)


@dataclass(frozen=True)
class Measured:
    """persistent: bytes of each part after building. reserved: at the end, on CUDA."""

    persistent: dict[str, int]
    readings: dict[str, Reading]
    tables: int
    reserved: int


def _rehearsed(plan: Plan) -> Rehearsal:
    job = Job.of(plan.config, plan.card)
    return rehearse(
        job.model,
        plan.config.optimizer,
        plan.choice,
        job.seq_len,
        attention=job.attention,
        workspace=job.workspace,
        updates=UPDATES,
    )


def _measured(plan: Plan, device: str, folder: Path) -> Measured:
    """The run itself, segment by segment."""
    config = plan.config.model_copy(
        update={"run": plan.config.run.model_copy(update={"out": str(folder)})}
    )
    # The profiler sees what is made while it runs; planning may have made these tables before.
    if device == "cpu":
        lookup_tables(device)
        lookup_table(device)
    text = ScratchText.of(config)
    rows = settled(config.train.micro_batch)
    # Read before anything is measured.
    updates = [list(text.batches.of(number).micro_batches(rows)) for number in range(UPDATES)]
    with meter_of(device) as meter:
        with told_out_of_memory(), meter.segment(BUILD):
            model, optimizer = build(config)
            model.initialise(config.train.seed)
            hold_worst_window(optimizer)  # as the rehearsal does
        with told_out_of_memory(partial(out_of_memory_table, plan, model, optimizer)):
            for batch in updates:
                _update(config, model, optimizer, batch, meter)
            _evaluate_and_save(config, model, optimizer, text, meter, folder)
    reserved = torch.cuda.memory_reserved() if device == "cuda" else 0
    persistent = bytes_by_part(persistent_tensors(optimizer))
    used = sum(bytes_by_part(tables(optimizer)).values()) if device == "cpu" else 0
    return Measured(persistent, meter.readings, used, reserved)


def _update(config: Config, model: Llama, optimizer: Optimizer, batch: Batch, meter: Meter) -> None:
    with meter.segment(GATHER):
        lr = settled(config.optimizer.lr)
        made = scratch_gradients(config, model, optimizer, batch, len(batch), lr)
    with meter.segment(STEP):
        optimizer.step()
    del made  # alive until here, as in training


def _evaluate_and_save(
    config: Config,
    model: Llama,
    optimizer: Optimizer,
    text: ScratchText,
    meter: Meter,
    folder: Path,
) -> None:
    seq_len, rows = settled(config.data.seq_len), settled(config.train.micro_batch)
    with meter.segment(EVALUATE):
        tokens = _EVALUATED * rows * seq_len
        evaluate(model, text.stream, seq_len=seq_len, tokens=tokens, rows=rows)
    (folder / "checkpoints").mkdir()
    corpus = NoText(folder, {}, text.stream, text.stream, "random tokens")
    run, at = Run(folder, config), Position(UPDATES, 0)
    try:
        with meter.segment(SAVE):
            checkpoint.save(run, model, optimizer, text.batches, corpus, at)
    except OSError as error:
        raise HardwareError(
            f"the checkpoint of the verification cannot be written to {folder}",
            str(error),
            "point LOWMEM_HOME at a folder with more room; it is removed at the end",
        ) from None


def compared(plan: Plan, rehearsal: Rehearsal, measured: Measured) -> Iterator[Row]:
    """Planned beside measured: what persists by part, then the peak of every segment."""
    for part in PERSISTENT:
        planned = rehearsal.persistent.get(part, 0)
        if planned or measured.persistent.get(part):
            yield Row(BUILD, part, planned, measured.persistent.get(part, 0))
    yield from _categories(plan, rehearsal, measured)
    segments = planned_peaks(rehearsal)
    memory = Peaks(plan.memory.tensors, plan.memory.allocated, plan.memory.reserved)
    most = _highest([measured.readings[name] for name in segments])
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
        found[name] = _merged(found.get(name), allocator.peaks)
        done = stop
    allocator.reset_peaks()
    return {**found, SAVE: allocator.peaks}


def _stretches(segments: dict[str, Segment]) -> Iterator[tuple[int, int, str]]:
    for name, segment in segments.items():
        for start, stop in segment.events:
            yield start, stop, name


def _merged(one: Peaks | None, other: Peaks) -> Peaks:
    if one is None:
        return other
    pairs = zip(
        (one.tensors, one.allocated, one.reserved),
        (other.tensors, other.allocated, other.reserved),
        strict=True,
    )
    return Peaks(*(max(pair) for pair in pairs))


def _highest(readings: list[Reading]) -> Reading:
    def most(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return max(known) if known else None

    return Reading(
        most([r.tensors for r in readings]),
        most([r.allocated for r in readings]),
        most([r.reserved for r in readings]),
        readings[-1].end,
    )


class NoText(Corpus):
    """A corpus without a tokenizer: a saved model folder then has none."""

    def tokenizer(self) -> None:  # type: ignore[override]
        return None


def _require_room(plan: Plan, device: str) -> None:
    """HardwareError where the machine is smaller than the card that is planned for."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        room = free + torch.cuda.memory_reserved()
        what = f"{torch.cuda.get_device_name()} has {room:,} of {total:,} bytes free"
    else:
        room, what = available_memory(), "the host has not enough memory"
    if plan.memory.reserved > room:
        raise HardwareError(
            f"this plan cannot be verified here: {what}",
            f"it needs {plan.memory.reserved:,} bytes, {room:,} are free",
            "verify it where the card is, or plan for this machine with --gpu auto",
        )


def _scratch_folder() -> Path:
    """Where the checkpoint of the verification goes for a moment: it may be as large as a model."""
    folder = cache_home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HardwareError(
            f"{folder} cannot be written",
            str(error),
            "point LOWMEM_HOME at a folder of yours",
        ) from None
    return folder


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _context(measured: Measured, before: SmiReading) -> int | None:
    """Context and loaded kernels: what this process took of the card beside the allocator.

    None where nvidia-smi did not say how much others use.
    """
    if before.driver == "unknown":
        return None
    free, total = torch.cuda.mem_get_info()
    taken = total - free - torch.cuda.memory_reserved() - before.used
    return taken if taken > 0 else None


def _of_host(command: str, rows: list[Row]) -> Calibration:
    return Calibration(
        date=now(),
        lowmem=__version__,
        torch=version("torch"),
        driver="none",
        name=processor(),
        total=available_memory(),
        command=command,
        rows=[_record(row) for row in rows],
    )


def _record(row: Row) -> dict[str, str | int | None]:
    return {
        "segment": row.segment,
        "what": row.what,
        "planned": row.planned,
        "measured": row.measured,
    }


def measured_rates(
    device: str = "cuda", *, side: int = 4096, seconds: float = 1.0
) -> tuple[float, float]:
    """(Tflop/s of bf16 products of side x side matrices, GB/s of copies), `seconds` of each.

    The best of many repetitions, since other programs only ever slow one down.
    """
    dtype = torch.bfloat16
    left, right, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    product = _best(lambda: torch.mm(left, right, out=out), device, seconds)
    copy = _best(lambda: out.copy_(left), device, seconds)
    return 2 * side**3 / product / 1e12, 2 * left.nbytes / copy / 1e9


def _best(work: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of one call of `work`."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(_REPEATS):
            work()
        wait()
        best = min(best, (time.perf_counter() - started) / _REPEATS)
    return best
