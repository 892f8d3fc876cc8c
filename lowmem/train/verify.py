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
from lowmem.planner.calibration import Calibration, Row, now
from lowmem.planner.hardware import SmiReading, available_memory, processor
from lowmem.planner.job import Job
from lowmem.planner.persistent import bytes_by_part, persistent_tensors, tables
from lowmem.planner.plan import Plan
from lowmem.planner.rehearse import EVALUATE, GATHER, STEP, Rehearsal, rehearse
from lowmem.train import checkpoint
from lowmem.train.build import build
from lowmem.train.cap import capped
from lowmem.train.comparison import BUILD, SAVE, WHOLE, Measured, compared
from lowmem.train.evaluate import evaluate
from lowmem.train.guard import told_out_of_memory
from lowmem.train.meters import Meter, meter_of
from lowmem.train.out_of_memory import out_of_memory_table
from lowmem.train.rates import measured_rates
from lowmem.train.run import Run
from lowmem.train.snapshot import Position
from lowmem.train.trial import Batch, ScratchText, scratch_gradients

UPDATES = 2
_EVALUATED = 3  # batches


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
    context = _context(smi)
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


def _context(before: SmiReading) -> int | None:
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
