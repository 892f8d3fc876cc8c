"""The training loop, whole: what happens in an update stands in `_train_from`."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.config.schema import MOVE_EARLY, Config, settled
from lowmem.data.batches import TrainingOrder, UpdateBatch, on_device
from lowmem.data.shards import Corpus, TokenStream
from lowmem.errors import DivergedError, Stopped, command_line
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.phases import phase
from lowmem.planner.plan import Plan
from lowmem.train import checkpoint, diagnose
from lowmem.train.build import build, declared_bytes, require_host_memory, text_of
from lowmem.train.cap import BALLAST, Cap, capped
from lowmem.train.convert import settings_of
from lowmem.train.disk import Patience, most_at_once, require_room
from lowmem.train.divergence import LEFT_OUT, Guard, RollBack, diverged, not_finite, sequences_of
from lowmem.train.evaluate import evaluate_as
from lowmem.train.events import (
    Capped,
    Continued,
    Evaluated,
    Finished,
    Paused,
    Report,
    RolledBack,
    Skipped,
    Started,
    Stopping,
    Storage,
    Trained,
    Tried,
)
from lowmem.train.guard import StopRequest, stop_requests, told_out_of_memory
from lowmem.train.ladder import Ladder
from lowmem.train.lock import held
from lowmem.train.measure import measured_peak, memory_bytes
from lowmem.train.out_of_memory import out_of_memory_table
from lowmem.train.run import Run, update_of
from lowmem.train.rungs import Rungs, rungs_of, standing_on
from lowmem.train.saver import Saver, host_copy_of
from lowmem.train.schedule import learning_rate
from lowmem.train.snapshot import Position, Snapshot
from lowmem.train.trial import is_wanted, try_out
from lowmem.train.watch import Watch

PAUSE_SECONDS = 1.0  # between two looks at the file PAUSE


def train(run: Run, corpus: Corpus, report: Report, plan: Plan | None = None) -> Finished:
    """Train a new run, or continue one from its checkpoint, to its last update.

    plan: its peak is compared with that of the first update; a run that goes on has it in its
    folder. Raises Stopped (exit 75) after a signal or the file STOP, when everything is saved;
    DivergedError; DataError; CheckpointError.
    """
    began = time.perf_counter()
    batches, validation = text_of(run.config, corpus)
    planned = plan or run.plan()
    if planned is not None:
        require_host_memory(planned)
    device = run.config.train.device
    with (
        held(run.folder),
        stop_requests(run.folder) as stop,
        told_out_of_memory(),
        capped(planned, device, BALLAST) as cap,
    ):
        checkpoint.tidy(run)
        disk = Patience(run, report, stop)
        watch = Watch.over(planned, device, cap)
        task = _Task(
            run,
            corpus,
            batches,
            validation,
            plan,
            planned,
            watch,
            stop,
            disk,
            _storage(run),
            cap,
            rungs_of(run.config),
        )
        if planned is not None and cap.bytes is not None:
            disk.record(Capped(planned.card.usable_bytes, BALLAST, planned.card.name))
        start, back = run.latest() if run.has_checkpoint else None, None
        if is_wanted(run.config):
            disk.record(_tried(task, start))
        while True:
            reached = _train_from(task, start, back)
            if isinstance(reached, Position):
                break
            back, start = reached, checkpoint.newest_until(run, reached.first)
            disk.record(_rolled_back(run, start, back))
        finished = _finished(task, reached, time.perf_counter() - began)
        disk.record(finished)
    return finished


@dataclass(frozen=True)
class _Task:
    """What stays the same however often a run goes back to an earlier checkpoint.

    plan: to compare with the first update. planned: also when the run goes on. rungs, eased: how
    far it came down where memory ran out, and what was done.
    """

    run: Run
    corpus: Corpus
    batches: TrainingOrder
    validation: TokenStream
    plan: Plan | None
    planned: Plan | None
    watch: Watch
    stop: StopRequest
    disk: Patience
    storage: Storage
    cap: Cap
    rungs: Rungs
    eased: list[str] = field(default_factory=list)


def _train_from(task: _Task, start: Path | None, back: RollBack | None) -> Position | RollBack:
    """Train from a checkpoint, or from the beginning, to the end or to where the run must go back.

    back: the rollback that has led here.
    """
    batches, report, stop, config = task.batches, task.disk.record, task.stop, task.run.config
    model, optimizer = build(config)
    ladder = Ladder(model, optimizer, task.rungs, task.planned, task.cap, report, task.eased)
    with ladder.calls():
        at = _begin(task, start, ladder)
    run = replace(task.run, start=None)  # from here on the newest checkpoint is the one to name
    guard, best = Guard.of(config.guard, at.carried.get("guard")), at.carried.get("best")
    if back is not None:
        guard.rolled_back(back)
    begun, updates = at.update, settled(config.train.updates)
    clip = config.train.clip if isinstance(config.train.clip, float) else None
    report(_started(run, batches, at, model.head_weight.device.type))
    if back is None:
        report(task.storage)
        report(diagnose.assigned(optimizer, model.roles()))

    def snapshot() -> Snapshot:
        carried = {"guard": guard.state(), "best": best} | ladder.carried()
        now = replace(at, carried=carried)
        return checkpoint.capture(run, model, optimizer, batches, task.corpus, now)

    def explained() -> tuple[str, str]:
        table, helps = out_of_memory_table(task.planned, model, optimizer)
        return f"{ladder.told()}\n{table}", helps

    behind = task.storage.host_copy > 0
    with (
        told_out_of_memory(explained),
        Saver(run, task.disk, behind=behind) as saver,
        ladder,
        ladder.saved_at_the_end(lambda: _save_now(saver, snapshot)),
    ):
        saver.prepare(snapshot)
        for update in range(at.update, updates):
            if stop and update == begun:
                raise _stopped_before(run, str(stop.signal), at.update)
            if guard.leaves_out(update):
                report(Skipped(update, LEFT_OUT, False, sequences_of(batches, update)))
                at = Position(update + 1, at.tokens)
            else:
                started = time.perf_counter()
                batch = batches.of(update)
                lr = learning_rate(config.schedule, settled(config.optimizer.lr), update, updates)
                first = task.plan if update == 0 else None
                cut = cache(partial(_micro_batches, batch))
                cut(ladder.rungs["micro_batch"])  # before anything is measured
                with measured_peak(model, optimizer, first, report):
                    loss, norm = ladder.gathered(
                        update, partial(_gradients, model, optimizer, batch.tokens, cut, lr, clip)
                    )
                    trouble = guard.trouble(loss.item(), norm.item())
                    if trouble is None:
                        optimizer.step()
                    else:
                        optimizer.discard()
                made = trouble is None or optimizer.mode in MOVE_EARLY
                at = Position(update + 1, at.tokens + batch.tokens * made)
                if trouble is None:
                    guard.accept(update, loss.item(), norm.item())
                    report(_trained(update, loss, norm, optimizer, at, batch, started))
                else:
                    report(Skipped(update, trouble, made, sequences_of(batches, update)))
                    match guard.refuse(update, spoilt=made and not_finite(loss, norm)):
                        case "roll back":
                            return guard.rollback(trouble)
                        case "give up":
                            saver.finish()
                            raise _given_up(run, update, trouble, optimizer.mode, guard)
            if update == begun:
                task.cap.take_ballast()  # what the first update took has been measured
            for grown in task.watch.after(update):
                report(grown)
                if grown.whose == "others":
                    ladder.ahead()
            saver.check()
            evaluating = _due(config.evaluate.every, at.update, updates)
            saving = _saving_due(config, at.update, updates) or stop.save_asked()
            if evaluating or at.update % diagnose.EVERY == 0:
                with ladder.calls():
                    figures = diagnose.diagnosed(update, optimizer)
                if figures is not None:
                    report(figures)
            if evaluating:
                evaluated = _evaluated(update, ladder, task.validation, config)
                is_best = best is None or evaluated.eval_loss < best["loss"]
                report(replace(evaluated, best=is_best))
                if is_best:
                    best = {"update": at.update, "loss": evaluated.eval_loss}
                    saving = saving or config.checkpoint.keep_best
            _wait_while_paused(run, stop, report)
            stopping = bool(stop) and at.update < updates
            if stopping:
                report(Stopping(str(stop.signal)))
            if saving or stopping:
                with ladder.calls():
                    saver.save(snapshot)
            if stopping:
                saver.finish()
                raise _stopped(run, str(stop.signal), at.update)
    if begun < updates and not guard.losses:
        raise diverged(updates - 1, "loss nan or inf in every update", optimizer.mode, guard, None)
    return at


def _storage(run: Run) -> Storage:
    """What saving will need. CheckpointError: more room than there is."""
    config, size = run.config, declared_bytes(run.config)
    existing = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    free = require_room(config, run.folder, size, existing)
    copy, why = host_copy_of(config.checkpoint.behind, size)
    return Storage(size, most_at_once(config), free, copy, why)


def _tried(task: _Task, start: Path | None) -> Tried:
    """The trial, with a model of its own, which is gone afterwards: nothing has changed."""
    began = time.perf_counter()
    config, rungs = task.run.config, task.rungs
    if start is not None:
        state = checkpoint.read_state(start)
        if state.get("settings") == settings_of(config):
            rungs = state["carried"].get("ladder", rungs)
    model, optimizer = build(config)
    explained = partial(out_of_memory_table, task.planned, model, optimizer)
    with told_out_of_memory(explained), phase("trial before the run"), standing_on(rungs, model):
        try_out(config, model, optimizer, rungs["micro_batch"], task.run.folder)
    del model, optimizer, explained
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
    return Tried(time.perf_counter() - began)


def _begin(task: _Task, start: Path | None, ladder: Ladder) -> Position:
    """New weights, or those of the checkpoint; metrics that it does not know are dropped."""
    run, at, model, optimizer = task.run, Position(), ladder.model, ladder.optimizer
    if start is None:
        model.initialise(run.config.train.seed)
    else:
        at, converted = checkpoint.restore(
            start,
            model,
            optimizer,
            task.batches,
            task.corpus,
            run.config if run.was_changed else None,
        )
        if converted is None:
            ladder.resume(at.carried.get("ladder"))
        else:  # with settings of its own, which were planned anew
            task.disk.record(converted)
        # What came after an earlier checkpoint is abandoned.
        task.disk.until_done("the name of the checkpoint", partial(run.point_at, start.name))
    task.disk.until_done("the metrics", partial(run.forget_after, at.update))
    return at


def _micro_batches(batch: UpdateBatch, rows: int) -> list[tuple[Tensor, Tensor]]:
    return list(batch.micro_batches(rows))


def _gradients(
    model: Llama,
    optimizer: Optimizer,
    tokens: int,
    cut: Callable[[int], list[tuple[Tensor, Tensor]]],
    lr: float,
    clip: float | None,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """(loss, norm) of an update of so many tokens, in the micro-batches that `cut(rows)` gives."""
    micro_batches = cut(rows)
    return gather(
        model,
        optimizer,
        MadeAnew(partial(on_device, micro_batches, model.head_weight.device)),
        count=len(micro_batches),
        tokens=tokens,
        lr=lr,
        clip=clip,
    )


def _save_now(saver: Saver, snapshot: Callable[[], Snapshot]) -> None:
    saver.save(snapshot)
    saver.finish()


def _saving_due(config: Config, done: int, updates: int) -> bool:
    """At every save, and at every checkpoint that is to stay for good."""
    for_good = config.checkpoint.keep_every
    return _due(config.checkpoint.every, done, updates) or bool(for_good and done % for_good == 0)


def _wait_while_paused(run: Run, stop: StopRequest, report: Report) -> None:
    """Wait until somebody removes the file PAUSE, or asks the run to stop."""
    if stop or not stop.paused:
        return
    began = time.perf_counter()
    report(Paused(f"{run.folder / 'PAUSE'} is there: remove it to go on"))
    while stop.paused and not stop.wait(PAUSE_SECONDS):
        pass
    report(Continued(time.perf_counter() - began))


def _rolled_back(run: Run, start: Path | None, back: RollBack) -> RolledBack:
    update = 0 if start is None else update_of(start)
    most = run.config.guard.rollbacks
    return RolledBack(update, back.why, back.first, back.last, back.number, most)


def _given_up(run: Run, update: int, trouble: str, mode: str, guard: Guard) -> DivergedError:
    """The error of a run that no rollback helps; its newest checkpoint is one from before."""
    assert guard.first_bad is not None
    healthy = checkpoint.newest_until(run, guard.first_bad)
    if healthy is not None:
        run.point_at(healthy.name)
    return diverged(update, trouble, mode, guard, healthy)


def _started(run: Run, batches: TrainingOrder, at: Position, device: str) -> Started:
    resumed = str(run.latest()) if at.update else None
    updates = settled(run.config.train.updates)
    differ = checkpoint.bits_differ_by(run.latest(), device) if at.update else []
    return Started(at.update, updates, batches.of(0).tokens, str(run.folder), resumed, differ)


def _due(every: int | str, done: int, updates: int) -> bool:
    """Every so many updates, and at the end; 0 is only at the end."""
    interval = settled(every)
    return done == updates or (isinstance(interval, int) and interval > 0 and done % interval == 0)


def _trained(
    update: int,
    loss: Tensor,
    norm: Tensor,
    optimizer: Optimizer,
    at: Position,
    batch: UpdateBatch,
    started: float,
) -> Trained:
    seconds = time.perf_counter() - started
    return Trained(
        update=update,
        loss=loss.item(),
        lr=optimizer.lr,
        tokens=at.tokens,
        grad_norm=norm.item(),
        norm_of=optimizer.norm_of,
        seconds=seconds,
        tokens_per_second=batch.tokens / seconds,
        memory_bytes=memory_bytes(loss.device),
    )


def _evaluated(update: int, ladder: Ladder, validation: TokenStream, config: Config) -> Evaluated:
    with ladder.calls():
        result = evaluate_as(
            config.data.protocol,
            ladder.model,
            validation,
            config.evaluate,
            seq_len=settled(config.data.seq_len),
            tokens=settled(config.evaluate.tokens),
            rows=ladder.rungs["evaluation"],  # the training's micro-batch, as rehearsed
            fewer=ladder.evaluation_rows,
        )
    return Evaluated(update, result.loss, result.tokens, result.seconds, result.published_loss)


def _stopped_before(run: Run, signal: str, updates: int) -> Stopped:
    return Stopped(
        f"stopped by {signal} before update {updates + 1}; nothing has changed",
        "the run was still loading",
        command_line("resume", run.folder),
    )


def _stopped(run: Run, signal: str, updates: int) -> Stopped:
    return Stopped(
        f"stopped by {signal} after {updates} updates; everything is saved",
        "the update was finished and a checkpoint written",
        command_line("resume", run.folder),
    )


def _finished(task: _Task, at: Position, seconds: float) -> Finished:
    """The summary; the last evaluation is read back, for a run that was already complete."""
    run, validation = task.run, task.validation
    evaluated = [line for line in run.metrics() if "eval_loss" in line]
    last = evaluated[-1] if evaluated else {"eval_loss": math.nan}  # metrics.jsonl was removed
    return Finished(
        update=at.update,
        eval_loss=last["eval_loss"],
        published_loss=last.get("published_loss"),
        unigram_loss=validation.unigram_loss(),
        tokens=at.tokens,
        seconds=seconds,
        checkpoint=str(run.latest()),
        eased=task.eased,
    )
