"""`lowmem eval`: token-weighted loss of a run, a checkpoint or a Hugging Face folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded
from lowmem.cli.train import corpus_of
from lowmem.cli.weights import run_of
from lowmem.config.schema import Config, DataConfig, EvaluateConfig
from lowmem.errors import CheckpointError, short
from lowmem.train.checkpoint import ABOUT, model_folder
from lowmem.train.evaluate import evaluate_folder


def evaluate(given: Given, path: Path, *, as_json: bool) -> None:
    """Evaluate on the run's own data, or on --data; other folders default to `sample`."""
    console = Console(quiet=given.quiet)
    model = model_folder(path)
    config = _config(given, path, model, console)
    console.say(f"data {config.data.source}, tokenizer {config.data.tokenizer}")
    corpus = corpus_of(config, console)
    tokens, seq_len = config.evaluate.tokens, config.data.seq_len
    result = evaluate_folder(
        path,
        corpus,
        tokens=tokens if isinstance(tokens, int) else None,
        seq_len=seq_len if isinstance(seq_len, int) else None,
        device=config.train.device,
        batches=config.evaluate,
    )
    if as_json:
        console.json({"schema_version": 1, "path": str(path), **asdict(result)})
    else:
        console.result(
            f"loss {result.loss:.4f}  perplexity {result.perplexity:.5g}"
            f"  {result.tokens:,} tokens  {result.seconds:.1f} s"
        )
        if result.published_loss is not None:
            console.result(
                f"as published {result.published_loss:.4f}  {result.published_perplexity:.5g}"
                f"  mean of {result.steps} batches, divided by {(result.steps or 0) + 1}: too low"
            )


def _config(given: Given, path: Path, model: Path, console: Console) -> Config:
    """What was given, on top of the run's own data or of the folder's own tokenizer."""
    result = loaded(given, console)
    chosen = {
        name: getattr(result.config.data, name)
        for name in DataConfig.model_fields
        if result.origins[f"data.{name}"] != "default"
    }
    run = run_of(path)
    own, batches = (run.config.data, {}) if run is not None else _told_by(model)
    changes: dict[str, Any] = {"model": str(model), "data": own.model_copy(update=chosen)}
    if run is None:
        changes["evaluate"] = result.config.evaluate.model_copy(update=batches)
    else:  # its budget decides how much of a stream was prepared
        device = result.config.train.device
        changes["train"] = run.config.train.model_copy(update={"device": device})
        changes["evaluate"] = run.config.evaluate.model_copy(
            update={"tokens": result.config.evaluate.tokens}
        )
    return result.config.model_copy(update=changes)


def _told_by(model: Path) -> tuple[DataConfig, dict[str, int]]:
    """Data and batches of evaluation of an exported model, if it says so; its own tokenizer."""
    tokenizer = {"tokenizer": str(model)} if (model / "tokenizer.json").is_file() else {}
    try:
        about = json.loads((model / ABOUT).read_text(encoding="utf-8"))
        data = DataConfig.model_validate({**about["data"], **tokenizer})
        batches = EvaluateConfig.model_validate(about.get("evaluate", {}))
        return data, batches.model_dump(include={"batch", "gpus"})
    except FileNotFoundError:
        return DataConfig.model_validate(tokenizer), {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{model / ABOUT} cannot be read",
            f"it says what the model was trained on: {short(str(error), 200)}",
            "copy the folder again, or remove the file and give --data",
        ) from error
