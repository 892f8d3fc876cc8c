"""The training loop, whole: what happens in an update stands in `train`."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, WeightFormat, settled
from lowmem.data.batches import Batches, UpdateBatch
from lowmem.data.shards import Corpus, TokenStream
from lowmem.errors import DataError, HardwareError, Stopped
from lowmem.kernels.attention import choose_backend
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.planner.plan import Plan
from lowmem.train import checkpoint, diagnose
from lowmem.train.checkpoint import Position
from lowmem.train.evaluate import evaluate, validation_of
from lowmem.train.events import (
    Evaluated,
    Event,
    Finished,
    Report,
    Saved,
    Started,
    Stopping,
    Trained,
)
from lowmem.train.guard import require_finite, stop_requests, told_out_of_memory
from lowmem.train.measure import measured_peak, memory_bytes
from lowmem.train.out_of_memory import out_of_memory_table
from lowmem.train.run import Run
from lowmem.train.schedule import learning_rate
from lowmem.train.watch import Watch


def train(run: Run, corpus: Corpus, report: Report, plan: Plan | None = None) -> Finished:
    """Train a new run, or continue one from its checkpoint, to its last update.

    plan: its peak is compared with that of the first update; a run that goes on has it in its
    folder. Raises Stopped (exit 75) after a
    signal, when everything is saved; DivergedError; DataError; CheckpointError.
    """
    config, began = run.config, time.perf_counter()
    report = _recorded(run, report)
    batches, validation = text_of(config, corpus)
    with told_out_of_memory():
        model, optimizer = build(config)
        at = _begin(run, model, optimizer, batches, corpus)
    run = replace(run, start=None)  # from here on the newest checkpoint is the one to name
    updates, rows = settled(config.train.updates), settled(config.train.micro_batch)
    clip = config.train.clip if isinstance(config.train.clip, float) else None
    report(_started(run, batches, at))
    report(diagnose.assigned(optimizer, model.roles()))

    planned = plan or run.plan()
    watch = Watch.over(planned, config.train.device)
    explained = partial(out_of_memory_table, planned, model, optimizer)
    with stop_requests() as stop, told_out_of_memory(explained):
        for update in range(at.update, updates):
            started = time.perf_counter()
            batch = batches.of(update)
            micro_batches = list(batch.micro_batches(rows))
            lr = learning_rate(config.schedule, settled(config.optimizer.lr), update, updates)
            first = plan if update == 0 else None
            with measured_peak(model, optimizer, first, report):
                loss, norm = gather(
                    model,
                    optimizer,
                    MadeAnew(partial(on_device, micro_batches, model.head_weight.device)),
                    count=len(micro_batches),
                    tokens=batch.tokens,
                    lr=lr,
                    clip=clip,
                )
                require_finite(update, loss.item(), norm.item(), optimizer.mode)
                optimizer.step()
            at = Position(update + 1, at.tokens + batch.tokens)
            report(_trained(update, loss, norm, optimizer, at, batch, started))
            for grown in watch.after(update):
                report(grown)
            evaluating = _due(config.evaluate.every, at.update, updates)
            if evaluating or at.update % diagnose.EVERY == 0:
                figures = diagnose.diagnosed(update, optimizer)
                if figures is not None:
                    report(figures)
            if evaluating:
                report(_evaluated(update, model, validation, config))
            stopping = bool(stop) and at.update < updates
            if stopping:
                report(Stopping(str(stop.signal)))
            if stopping or _due(config.checkpoint.every, at.update, updates):
                report(_saved(run, model, optimizer, batches, corpus, at))
            if stopping:
                raise _stopped(run, str(stop.signal), at.update)
    finished = _finished(run, validation, at, time.perf_counter() - began)
    report(finished)
    return finished


def require_hardware(config: Config) -> None:
    """HardwareError unless this machine has the device and the packages that a run asks for."""
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


def build(config: Config) -> tuple[Llama, Optimizer]:
    """The model, uninitialised, and its optimizer. Raises as `require_hardware`."""
    require_hardware(config)
    weights: WeightFormat = settled(config.train.weights)
    model = Llama(
        resolve_model(config.model, Path.cwd()),
        dtype=compute_dtype(weights, config.train.device),
        device=config.train.device,
        int8=weights == "int8",
        int8_ends=config.train.ends == "int8",
        recompute=settled(config.train.recompute),
        keep_logits=config.train.logits == "keep",
        attention=config.train.attention,
    )
    optimizer = build_optimizer(
        config.optimizer,
        model.weights(),
        model.roles(),
        mode=settled(config.train.update),
        seed=config.train.seed,
        head_dim=model.config.head_dim,
    )
    optimizer.attach(model)
    if config.train.device == "cuda":
        _repeat_exactly(model)
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


def text_of(config: Config, corpus: Corpus) -> tuple[Batches, TokenStream]:
    """What a run reads: (the order of training, the validation part). DataError: too little."""
    if corpus.train is None:
        raise DataError(
            f"{corpus.folder} has no training part",
            "every file is named as validation",
            "add files without `validation` in their names, or use lowmem eval",
        )
    batches = Batches(
        corpus.train,
        seq_len=settled(config.data.seq_len),
        rows_per_update=rows_of(config.train.batch, settled(config.data.seq_len)),
        seed=config.train.seed,
    )
    return batches, validation_of(corpus)


def _begin(
    run: Run, model: Llama, optimizer: Optimizer, batches: Batches, corpus: Corpus
) -> Position:
    """New weights, or those of the checkpoint; metrics that it does not know are dropped."""
    if not run.has_checkpoint:
        model.initialise(run.config.train.seed)
        at = Position()
    else:
        at = checkpoint.restore(run.latest(), model, optimizer, batches, corpus)
        run.point_at(run.latest().name)  # what came after an earlier checkpoint is abandoned
    run.forget_after(at.update)
    return at


def _recorded(run: Run, report: Report) -> Report:
    """`report`, with every event written to the run's files first."""

    def both(event: Event) -> None:
        run.record(event)
        report(event)

    return both


def _started(run: Run, batches: Batches, at: Position) -> Started:
    resumed = str(run.latest()) if at.update else None
    updates = settled(run.config.train.updates)
    return Started(at.update, updates, batches.of(0).tokens, str(run.folder), resumed)


def on_device(
    micro_batches: list[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """One micro-batch at a time; copied on the CPU too, so that it is counted like elsewhere."""
    for inputs, targets in micro_batches:
        yield inputs.to(device, copy=True), targets.to(device, copy=True)


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


def _evaluated(update: int, model: Llama, validation: TokenStream, config: Config) -> Evaluated:
    result = evaluate(
        model,
        validation,
        seq_len=settled(config.data.seq_len),
        tokens=settled(config.evaluate.tokens),
        rows=settled(config.train.micro_batch),  # as rehearsed
    )
    return Evaluated(update, result.loss, result.tokens, result.seconds)


def _saved(
    run: Run,
    model: Llama,
    optimizer: Optimizer,
    batches: Batches,
    corpus: Corpus,
    at: Position,
) -> Saved:
    started = time.perf_counter()
    folder = checkpoint.save(run, model, optimizer, batches, corpus, at)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Saved(at.update, str(folder), size, time.perf_counter() - started)


def _stopped(run: Run, signal: str, updates: int) -> Stopped:
    return Stopped(
        f"stopped by {signal} after {updates} updates; everything is saved",
        "the update was finished and a checkpoint written",
        f"lowmem resume {run.folder}",
    )


def _finished(run: Run, validation: TokenStream, at: Position, seconds: float) -> Finished:
    """The summary; the last evaluation is read back, for a run that was already complete."""
    losses = [line["eval_loss"] for line in run.metrics() if "eval_loss" in line]
    return Finished(
        update=at.update,
        eval_loss=losses[-1] if losses else math.nan,  # metrics.jsonl was removed by hand
        unigram_loss=validation.unigram_loss(),
        tokens=at.tokens,
        seconds=seconds,
        checkpoint=str(run.latest()),
    )
