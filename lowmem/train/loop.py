"""The training loop, whole: what happens in an update stands in `train`."""

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.schema import MOVE_EARLY, Config, WeightFormat, settled
from lowmem.data.batches import Batches, TrainingOrder, UpdateBatch, on_device
from lowmem.data.documents import DocumentBatches
from lowmem.data.shards import Corpus, TokenStream
from lowmem.errors import ConfigError, DataError, DivergedError, HardwareError, Stopped, short
from lowmem.kernels.attention import choose_backend
from lowmem.kernels.compiled import compiles
from lowmem.kernels.scaled_matmul import multiplies_fp8
from lowmem.model.huggingface import folder_weights
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.phases import phase
from lowmem.planner.hardware import available_memory
from lowmem.planner.plan import Plan
from lowmem.train import checkpoint, diagnose
from lowmem.train.cap import BALLAST, Cap, capped
from lowmem.train.convert import settings_of
from lowmem.train.disk import Patience, most_at_once, require_room
from lowmem.train.divergence import (
    LEFT_OUT,
    Guard,
    RollBack,
    diverged,
    not_finite,
    sequences_of,
)
from lowmem.train.evaluate import evaluate_as, validation_of
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
from lowmem.units import format_bytes

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
    report(_started(run, batches, at))
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


def require_hardware(config: Config) -> None:
    """HardwareError unless this machine has the device and the packages that a run asks for.

    ConfigError where a launcher started several processes for it.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE={short(processes)}: a run is one process on one device",
            "torchrun and its like would start the same run several times",
            "run it without a launcher; CUDA_VISIBLE_DEVICES=1 chooses the second card",
        )
    device = config.train.device
    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError(
            'train.device = "cuda", but there is no CUDA device',
            "a checkpoint continues exactly only on the kind of device it was made on",
            "run it where the card is",
        )
    model = resolve_model(config.model, Path.cwd())
    dtype = compute_dtype(settled(config.train.weights), device)
    backend = choose_backend(config.train.attention, torch.device(device), dtype, model.head_dim)
    if backend == "flash" and torch.cuda.get_device_capability() < (8, 0):
        raise HardwareError(
            f"{torch.cuda.get_device_name()} has no bf16 attention",
            "bf16 needs compute capability 8.0 (Ampere) or newer",
            "--weights fp32",
        )
    if config.train.matmul == "fp8" and device == "cuda" and not multiplies_fp8():
        raise HardwareError(
            f'train.matmul = "fp8", but {torch.cuda.get_device_name()} has no products in fp8',
            "they need compute capability 8.9 (Ada) or newer",
            "--matmul int8 or --matmul exact",
        )
    if config.train.compile and not compiles(torch.device(device)):
        raise HardwareError(
            f"train.compile = true on {device}, where torch.compile has no compiler",
            "it takes a C++ compiler on a CPU (c++, g++, clang++ or $CXX) and Triton on a card",
            "install one, or train.compile = false, which runs the same without it",
        )


def require_host_memory(plan: Plan) -> None:
    """HardwareError unless this machine has the host memory that the plan takes."""
    free, needs = available_memory(), plan.memory.host
    if needs > free:
        raise HardwareError(
            f"the plan takes {format_bytes(needs)} of host memory, {format_bytes(free)} are free",
            "; ".join(what for what, where in plan.choice.away() if where == "host"),
            "--sums int8, --place device, --blocks device, --boundaries keep, a smaller --batch, "
            "or a machine with more memory",
        )


def build(config: Config) -> tuple[Llama, Optimizer]:
    """The model, uninitialised, and its optimizer. Raises as `require_hardware`."""
    require_hardware(config)
    model, optimizer = declared(config, config.train.device)
    optimizer.attach(model)
    if config.train.device == "cuda":
        _repeat_exactly(model)
    return model, optimizer


def declared(config: Config, device: str) -> tuple[Llama, Optimizer]:
    """The model and the optimizer with all its state, on any device; "meta" allocates nothing."""
    weights: WeightFormat = settled(config.train.weights)
    model = Llama(
        resolve_model(config.model, Path.cwd()),
        dtype=compute_dtype(weights, config.train.device),
        device=device,
        int8=weights == "int8",
        int8_ends=config.train.ends == "int8",
        recompute=settled(config.train.recompute),
        keep_logits=config.train.logits == "keep",
        attention="cpu" if device == "meta" else config.train.attention,  # nothing runs there
        boundaries="host" if config.train.boundaries == "host" else "keep",
        blocks="host" if config.train.blocks == "host" else "device",
        compiled=config.train.compile,
        matmul=config.train.matmul,
    )
    optimizer = build_optimizer(
        config.optimizer,
        model.weights(),
        model.roles(),
        mode=settled(config.train.update),
        seed=config.train.seed,
        head_dim=model.config.head_dim,
        # Runs that were planned before there was a choice have fp32.
        sums="fp32" if config.train.sums == "auto" else settled(config.train.sums),
    )
    return model, optimizer


def _repeat_exactly(model: Llama) -> None:
    """Choose CUDA kernels that give the same bits every time: exact resume needs them.

    The float32 attention of PyTorch has no such backward; it warns, and a resumed float32 run on a
    card is close but not equal.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of library users; see cli/main.py
    torch.use_deterministic_algorithms(True, warn_only=model.backend == "efficient")
    # We never read what we have not written, and filling it would cost a kernel each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def text_of(config: Config, corpus: Corpus) -> tuple[TrainingOrder, TokenStream]:
    """What a run reads: (the order of training, the validation part). DataError: too little."""
    if corpus.train is None:
        raise DataError(
            f"{corpus.folder} has no training part",
            "every file is named as validation",
            "add files without `validation` in their names, or use lowmem eval",
        )
    seq_len = settled(config.data.seq_len)
    rows = rows_of(config.train.batch, seq_len)
    if config.data.protocol == "galore":
        # A subspace comes from the first micro-batch there: not from the longest documents alone.
        by_length = config.train.update != "fused+subspace"
        documents = DocumentBatches(
            corpus.train, seq_len=seq_len, rows_per_update=rows, by_length=by_length
        )
        return documents, validation_of(corpus)
    seed = config.train.seed
    packed = Batches(corpus.train, seq_len=seq_len, rows_per_update=rows, seed=seed)
    return packed, validation_of(corpus)


def declared_bytes(config: Config) -> int:
    """Bytes of the weights and states that a checkpoint will hold, from their declarations."""
    model, optimizer = declared(config, "meta")
    tensors = [*folder_weights(model), *optimizer.state_tensors()]
    return sum(tensor.nbytes for _, tensor in tensors)


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


def _started(run: Run, batches: TrainingOrder, at: Position) -> Started:
    resumed = str(run.latest()) if at.update else None
    updates = settled(run.config.train.updates)
    return Started(at.update, updates, batches.of(0).tokens, str(run.folder), resumed)


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
        f"lowmem resume {run.folder}",
    )


def _stopped(run: Run, signal: str, updates: int) -> Stopped:
    return Stopped(
        f"stopped by {signal} after {updates} updates; everything is saved",
        "the update was finished and a checkpoint written",
        f"lowmem resume {run.folder}",
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
