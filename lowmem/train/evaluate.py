"""Validation: the mean loss per target token, every token counted once."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem.data.batches import validation_batches
from lowmem.data.shards import Corpus, TokenStream
from lowmem.errors import CheckpointError, ConfigError, DataError, HardwareError
from lowmem.model.huggingface import dtype_of, load_folder
from lowmem.model.llama import Llama
from lowmem.phases import phase
from lowmem.train.checkpoint import ABOUT, model_folder
from lowmem.train.events import perplexity
from lowmem.train.retried import without_frames

TOKENS_AT_ONCE = 4096  # per forward pass, where no plan says otherwise
LONGEST = 1024  # sequence length of a folder that does not say how it was trained


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token."""

    loss: float
    perplexity: float
    tokens: int
    seconds: float


def evaluate(
    model: Llama,
    stream: TokenStream,
    *,
    seq_len: int,
    tokens: int | None,
    rows: int | None = None,
    fewer: Callable[[torch.OutOfMemoryError, int], int] | None = None,
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
        done = 0
        while done < len(inputs):
            part = slice(done, done + at_once)
            try:
                with phase("evaluation"):
                    total += model.loss_sum(inputs[part].to(device), targets[part].to(device))
            except torch.OutOfMemoryError as error:
                failed = without_frames(error)
            else:
                done += at_once
                continue
            at_once = (fewer or halved)(failed, at_once)
        count += int((targets >= 0).sum())
    loss = total.item() / count
    seconds = time.perf_counter() - began
    return Evaluation(loss, perplexity(loss), count, seconds)


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
    path: Path, corpus: Corpus, *, tokens: int | None, seq_len: int | None, device: str
) -> Evaluation:
    """Evaluate a run, a checkpoint or any Hugging Face LLaMA folder in its own dtype.

    seq_len: that of its training when None. HardwareError: a device that is not there.
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
    model = load_folder(folder, dtype, device)
    longest = model.config.max_position_embeddings
    length = seq_len or trained_length(folder, longest)
    if length > longest:
        raise ConfigError(
            f"data.seq_len = {length} is more than the model's {longest} positions",
            "max_position_embeddings of the model",
            f"--seq-len {longest}",
        )
    return evaluate(model, validation_of(corpus), seq_len=length, tokens=tokens)


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
