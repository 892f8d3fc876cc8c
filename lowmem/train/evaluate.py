"""Validation: the mean loss per target token, every token counted once.

Under the papers' protocol also what their trainers print for the same losses. They average the
means of batches, so a token of a short document counts more, and divide the sum of N batches by
N + 1, so that their perplexity is too low: by 2 % for the 180 batches of 60M and 130M.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.config.schema import EvaluateConfig, Protocol
from lowmem.data.batches import validation_batches
from lowmem.data.documents import evaluation_steps
from lowmem.data.shards import Corpus, TokenStream
from lowmem.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HardwareError,
    OutOfMemoryError,
)
from lowmem.model.huggingface import dtype_of, load_folder
from lowmem.model.llama import Llama
from lowmem.phases import phase
from lowmem.train.checkpoint import ABOUT, model_folder
from lowmem.train.events import perplexity
from lowmem.train.retried import without_frames

TOKENS_AT_ONCE = 4096  # per forward pass, where no plan says otherwise
LONGEST = 1024  # sequence length of a folder that does not say how it was trained


Fewer = Callable[[torch.OutOfMemoryError, int], int]
"""Asked for a smaller number of windows at a time, after an error with this one."""


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. published_loss: the papers' from the same losses; None: not theirs.

    steps: N, over which the papers average.
    """

    loss: float
    perplexity: float
    tokens: int
    seconds: float
    published_loss: float | None = None
    published_perplexity: float | None = None
    steps: int | None = None


def evaluate(
    model: Llama,
    stream: TokenStream,
    *,
    seq_len: int,
    tokens: int | None,
    rows: int | None = None,
    fewer: Fewer | None = None,
) -> Evaluation:
    """Loss over the first `tokens` targets of a stream, all of them if None.

    Windows of seq_len tokens in order, the last one as long as it is; sums in float64. rows:
    windows per forward pass. fewer: asked for a smaller number of them where the device runs out
    of memory, `halved` if nobody is; the loss is the same but for the order of the sums.
    """
    began = time.perf_counter()
    device = model.head_weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    at_once = rows or max(1, TOKENS_AT_ONCE // seq_len)
    for inputs, targets in validation_batches(stream, seq_len, at_once, tokens):
        at_once = _add_losses(total, model, inputs, targets, at_once, fewer)
        count += int((targets >= 0).sum())
    loss = total.item() / count
    seconds = time.perf_counter() - began
    return Evaluation(loss, perplexity(loss), count, seconds)


def evaluate_as(
    protocol: Protocol,
    model: Llama,
    stream: TokenStream,
    batches: EvaluateConfig,
    *,
    seq_len: int,
    tokens: int | None,
    rows: int | None = None,
    fewer: Fewer | None = None,
) -> Evaluation:
    """`evaluate`, or the papers' evaluation in their batches."""
    if protocol == "lowmem":
        return evaluate(model, stream, seq_len=seq_len, tokens=tokens, rows=rows, fewer=fewer)
    batch, gpus = batches.batch, batches.gpus
    return evaluate_documents(
        model,
        stream,
        seq_len=seq_len,
        tokens=tokens,
        batch=batch,
        gpus=gpus,
        rows=rows,
        fewer=fewer,
    )


def evaluate_documents(
    model: Llama,
    stream: TokenStream,
    *,
    seq_len: int,
    tokens: int | None,
    batch: int,
    gpus: int,
    rows: int | None = None,
    fewer: Fewer | None = None,
) -> Evaluation:
    """The papers' evaluation until more than `tokens` that are no padding are seen; None: all.

    batch: documents whose mean loss counts once. gpus: how many batches are taken at a time. rows:
    documents per forward pass. fewer: as for `evaluate`.

    Source: `evaluate_model` of GaLore's released trainer, arXiv:2403.03507: its counter of batches
    begins at 1.
    """
    began = time.perf_counter()
    device = model.head_weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    means = torch.zeros_like(total)
    count = steps = 0
    at_once = rows = rows or max(1, TOKENS_AT_ONCE // seq_len)
    for step in evaluation_steps(stream, seq_len, batch, gpus, tokens):
        for one in step:
            summed = torch.zeros_like(total)
            for inputs, targets in one.rows.micro_batches(rows):
                at_once = _add_losses(summed, model, inputs, targets, at_once, fewer)
            total += summed
            means += summed / (one.rows.tokens * len(step))
            count += one.rows.tokens
        steps += 1
    if not count:
        raise DataError(f"no document of {stream.folder} has two tokens", "", "give more text")
    loss, published = total.item() / count, means.item() / (steps + 1)
    return Evaluation(
        loss,
        perplexity(loss),
        count,
        time.perf_counter() - began,
        published,
        perplexity(published),
        steps,
    )


def _add_losses(
    total: Tensor,
    model: Llama,
    inputs: Tensor,
    targets: Tensor,
    at_once: int,
    fewer: Fewer | None,
) -> int:
    """Add the losses of these windows, so many at once; how many fitted at once in the end."""
    done = 0
    while done < len(inputs):
        part = slice(done, done + at_once)
        try:
            with phase("evaluation"):
                loss = model.loss_sum(inputs[part].to(total.device), targets[part].to(total.device))
                total += loss
        except torch.OutOfMemoryError as error:
            failed = without_frames(error)
        else:
            done += at_once
            continue
        at_once = (fewer or halved)(failed, at_once)
    return at_once


def halved(failed: torch.OutOfMemoryError, rows: int) -> int:
    """Half as many windows after garbage and cache are freed; the error where there was but one."""
    if rows == 1:
        raise failed
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
    return rows // 2


def validation_of(corpus: Corpus) -> TokenStream:
    """The validation part. DataError if the corpus has none."""
    if corpus.validation is None:
        raise DataError(
            f"{corpus.folder} has no validation part",
            "it was prepared from too little text",
            "add a file with `validation` in its name",
        )
    return corpus.validation


def evaluate_folder(
    path: Path,
    corpus: Corpus,
    *,
    tokens: int | None,
    seq_len: int | None,
    device: str,
    batches: EvaluateConfig | None = None,
) -> Evaluation:
    """Evaluate a run, a checkpoint or any Hugging Face LLaMA folder in its own dtype.

    A corpus of cut documents is evaluated by the papers' protocol, in their `batches` (None: those
    of a configuration that says nothing).

    seq_len: that of its training when None. HardwareError: a device that is not there.
    OutOfMemoryError: not even one sequence fits.
    """
    folder = model_folder(path)
    config = _json_of(folder / "config.json")
    dtype = dtype_of(config)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError("--device cuda: there is no CUDA device", "", "--device cpu")
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    with _told_out_of_memory(path):
        model = load_folder(folder, dtype, device)
    longest = model.config.max_position_embeddings
    length = corpus.row_tokens or seq_len or trained_length(folder, longest)
    if length > longest:
        raise ConfigError(
            f"data.seq_len = {length} is more than the model's {longest} positions",
            "max_position_embeddings of the model",
            f"--seq-len {longest}",
        )
    protocol: Protocol = "lowmem" if corpus.row_tokens is None else "galore"
    stream = validation_of(corpus)
    batches = batches or EvaluateConfig()
    with _told_out_of_memory(path):
        return evaluate_as(protocol, model, stream, batches, seq_len=length, tokens=tokens)


@contextmanager
def _told_out_of_memory(path: Path) -> Iterator[None]:
    """Turn the device's out-of-memory error into ours; one sequence at a time has been tried."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        reason = str(without_frames(error)).partition("\n")[0]
    raise OutOfMemoryError(
        f"the device ran out of memory in the evaluation of {path}",
        reason,
        "end what else uses the card, or take another: --device cpu",
    )


def trained_length(folder: Path, longest: int) -> int:
    """Sequence length that a model folder was trained with, if it says so."""
    if (folder / ABOUT).is_file():
        return int(_json_of(folder / ABOUT)["data"]["seq_len"])
    return min(LONGEST, longest)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read", str(error), "copy the folder anew"
        ) from None
    return content if isinstance(content, dict) else {}
