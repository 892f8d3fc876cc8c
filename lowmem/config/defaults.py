"""What nobody gave and what does not depend on memory: device, model, lengths and budgets.

The planner fills the rest. Every value that is chosen here is reported with its reason.
"""

import math
from pathlib import Path
from typing import Any

from lowmem.config.presets import resolve_model
from lowmem.config.schema import Auto, Config, ModelConfig, WeightFormat, settled
from lowmem.config.step_law import STEP_LAW, rate_by_law
from lowmem.errors import ConfigError
from lowmem.units import format_count, parse_batch

SEQ_LEN = 256  # the papers' C4 protocol
PAPER_BATCH = 512  # sequences per update in the same protocol
MOST_ROWS = 2**24  # sequences per update: more than anyone's, and sizes stay within 64 bits
TOKENS_PER_PARAMETER = 20  # arXiv:2203.15556, section 3
SAMPLE_BATCH = {"cuda": 32, "cpu": 8}  # the sample corpus is small
SAMPLE_UPDATES = {"cuda": 1000, "cpu": 500}
EVAL_TOKENS = {"cuda": 10_000_000, "cpu": 100_000}


def settle(config: Config, *, cuda: bool) -> tuple[Config, list[str]]:
    """(configuration with everything filled that the planner does not choose, notes for people).

    cuda: whether the run is planned for a CUDA device. ConfigError: contradictions.
    """
    notes: list[str] = []
    device = "cuda" if config.train.device == "auto" and cuda else config.train.device
    device = "cpu" if device == "auto" else device
    spec = config.model
    if spec == "auto":
        spec = "llama-60m" if device == "cuda" else "llama-tiny"
        notes.append(_model_note(spec, device))
    model = resolve_model(spec, Path.cwd())
    if config.data.source == "sample":
        notes.append("data: the sources of Python's standard library; C4 with --data c4")
    seq_len = _sequence_length(config, model, notes)
    rows = _rows(config, seq_len, device, notes)
    updates: int | Auto = "auto"  # hours: by the planner, which knows how fast the card is
    if config.train.hours is None:
        updates = _updates(config, model, rows * seq_len, device, notes)
    changes: dict[str, Any] = {
        "optimizer": _rate(config, model, rows, seq_len, updates, notes),
        "train": {
            "device": device,
            "batch": f"{rows}seq",
            "tokens": None,
            "weights": _weights(config, device),
        },
        "data": {"seq_len": seq_len},
        "evaluate": _evaluation(config, device),
    }
    sections = {
        name: getattr(config, name).model_copy(update=values) for name, values in changes.items()
    }
    filled = config.model_copy(update={"model": spec, **sections})
    return (filled if updates == "auto" else with_updates(filled, updates)), notes


def with_updates(config: Config, updates: int) -> Config:
    """`config` for a run of so many updates, with what follows from their number."""
    evaluate, checkpoint = config.evaluate, config.checkpoint
    if evaluate.every == "auto":
        evaluate = evaluate.model_copy(update={"every": max(1, updates // 5)})
    if checkpoint.every == "auto":
        checkpoint = checkpoint.model_copy(update={"every": min(1000, max(1, updates // 5))})
    train = config.train.model_copy(update={"updates": updates, "hours": None})
    return config.model_copy(
        update={"train": train, "evaluate": evaluate, "checkpoint": checkpoint}
    )


def _model_note(name: str, device: str) -> str:
    why = "the smallest of the papers" if device == "cuda" else "no CUDA device: minutes on a CPU"
    return f"model {name}: {why}; another with --model"


def _sequence_length(config: Config, model: ModelConfig, notes: list[str]) -> int:
    longest = model.max_position_embeddings
    if config.data.seq_len == "auto":
        why = "the papers' C4 protocol" if longest >= SEQ_LEN else "the model has no more positions"
        notes.append(f"seq-len {min(SEQ_LEN, longest)}: {why}")
        return min(SEQ_LEN, longest)
    length = settled(config.data.seq_len)
    if length > longest:
        raise ConfigError(
            f"data.seq_len = {length} is more than the model's {longest} positions",
            "max_position_embeddings of the model",
            f"--seq-len {longest}, or a model made for longer sequences",
        )
    return length


def rows_of(batch: str, seq_len: int) -> int:
    """Sequences per update of "32seq" or "131k-tokens". ConfigError: less than one, or too many."""
    number, unit = parse_batch(batch)
    rows = number if unit == "seq" else round(number / seq_len)
    if unit == "tokens" and number < seq_len:
        raise ConfigError(
            f"train.batch = {batch!r} is less than one sequence of {seq_len} tokens",
            "an update needs at least one sequence",
            f"--batch {seq_len}-tokens, or a shorter --seq-len",
        )
    if rows > MOST_ROWS:
        raise ConfigError(
            f"train.batch = {batch!r} is {format_count(rows)} sequences",
            f"an update has at most {MOST_ROWS:,}",
            f"--batch {MOST_ROWS}seq, or less",
        )
    return rows


def _rows(config: Config, seq_len: int, device: str, notes: list[str]) -> int:
    if config.train.batch != "auto":
        return rows_of(config.train.batch, seq_len)
    rows = SAMPLE_BATCH[device] if config.data.source == "sample" else PAPER_BATCH
    notes.append(f"batch {rows}seq: {format_count(rows * seq_len)} tokens per update")
    return rows


def _updates(
    config: Config, model: ModelConfig, tokens_per_update: int, device: str, notes: list[str]
) -> int:
    if config.train.updates != "auto":
        return settled(config.train.updates)
    if config.train.tokens is not None:
        return max(1, math.ceil(config.train.tokens / tokens_per_update))
    if config.data.source == "sample":
        updates = SAMPLE_UPDATES[device]
        notes.append(f"updates {updates}: the sample corpus is small; more with --updates")
        return updates
    updates = math.ceil(TOKENS_PER_PARAMETER * model.parameters / tokens_per_update)
    notes.append(f"updates {updates}: {TOKENS_PER_PARAMETER} tokens per parameter")
    return updates


def _rate(
    config: Config,
    model: ModelConfig,
    rows: int,
    seq_len: int,
    updates: int | Auto,
    notes: list[str],
) -> dict[str, float]:
    if config.optimizer.lr != STEP_LAW:
        return {}
    if updates == "auto":
        raise ConfigError(
            f'optimizer.lr = "{STEP_LAW}" with train.hours',
            "the law needs the number of tokens, which --hours leaves to the speed of the card",
            "--tokens or --updates instead of --hours, or --lr RATE",
        )
    rate, note = rate_by_law(config, model, rows, seq_len, updates)
    notes.append(note)
    return {"lr": rate}


def _weights(config: Config, device: str) -> WeightFormat | Auto:
    """On a card the planner chooses what is left open."""
    weights, ends = config.train.weights, config.train.ends
    if ends == "int8" and weights not in ("auto", "int8"):
        raise ConfigError(
            f'train.ends = "int8" with train.weights = "{weights}"',
            "codes in embedding and head are for models whose blocks are in codes, which need "
            "the memory more",
            "--weights int8, or --ends exact",
        )
    if weights == "auto" and ends == "int8":
        return "int8"
    return "fp32" if weights == "auto" and device == "cpu" else weights


def _evaluation(config: Config, device: str) -> dict[str, int]:
    tokens = config.evaluate.tokens
    return {"tokens": EVAL_TOKENS[device] if tokens == "auto" else settled(tokens)}
