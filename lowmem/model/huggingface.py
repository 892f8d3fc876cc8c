"""Hugging Face folders: configuration and weights, loaded and saved tensor by tensor.

model = load_folder(Path("meta-llama"), torch.bfloat16, "cuda")
save_folder(model, Path("export"), tokenizer=None)     # AutoModelForCausalLM reads it
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem.config.huggingface import (
    huggingface_config,
    huggingface_generation_config,
    model_config_from_huggingface,
)
from lowmem.config.schema import Level, ModelConfig
from lowmem.errors import CheckpointError
from lowmem.model.llama import Llama
from lowmem.tensorfile import read_tensors, write_tensors

WEIGHTS = "model.safetensors"
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}\.safetensors")
INDEX = "model.safetensors.index.json"


class SavedTokenizer(Protocol):
    """What a folder needs to know of the tokenizer: its files, and where a document ends."""

    @property
    def end_id(self) -> int: ...

    def save(self, folder: Path) -> None: ...


def save_folder(model: Llama, folder: Path, tokenizer: SavedTokenizer | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors, and the tokenizer's files.

    The folder is made where it is missing. The end-of-document token becomes eos_token_id, so that
    generation stops at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    dtype = str(weights[0][1].dtype).removeprefix("torch.")
    config = model.config
    if tokenizer is not None:
        config = config.model_copy(update={"eos_token_id": tokenizer.end_id})
    _write_json(folder / "config.json", huggingface_config(config, dtype))
    _write_json(folder / "generation_config.json", huggingface_generation_config(config))
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)


def load_folder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    recompute: Level = "keep",
    attention: str = "auto",
) -> Llama:
    """The model of a Hugging Face folder, single file or sharded, cast to `dtype`.

    One tensor at a time is in host memory. CheckpointError: a file, tensor or shape that does not
    match, by name; ConfigError: a config.json of another model.
    """
    data = _read_json(folder / "config.json")
    config = model_config_from_huggingface(data)
    _require_size(folder, config)
    model = Llama(config, dtype=dtype, device=device, recompute=recompute, attention=attention)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: Llama, folder: Path) -> None:
    """Copy the weights of a Hugging Face folder into `model`, strictly.

    CheckpointError: a file, tensor or shape that does not match, by name.
    """
    wanted = dict(model.named_parameters())
    missing = set(wanted)
    for name, tensor in _stored(folder):
        if name not in wanted:
            if not _may_be_skipped(name, model.config):
                raise _mismatch(folder, f"{name} is no weight of this model")
            continue
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
            raise _mismatch(folder, f"{name} has shape {shapes}")
        wanted[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise _mismatch(folder, f"no tensor for {', '.join(sorted(missing)[:5])}")


def _require_size(folder: Path, config: ModelConfig) -> None:
    """CheckpointError for a config.json of a model that its files cannot hold.

    Found before the model is made: a damaged number must not take all the memory there is.
    """
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if 0 < held < config.parameters:  # a weight takes a byte at least
        needed = f"{config.parameters:,} weights, the files have {held:,} bytes"
        raise _mismatch(folder, f"config.json describes {needed}")


def _may_be_skipped(name: str, config: ModelConfig) -> bool:
    """A second copy of a tied head, and rotary tables that old versions of transformers stored."""
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the folder's safetensors, one at a time."""
    if (folder / INDEX).exists():
        files = _indexed(folder / INDEX)
    else:
        files = [WEIGHTS]
    for file in files:
        if not (folder / file).exists():
            raise CheckpointError(
                f"{folder / file} is missing",
                f"weights are read from {WEIGHTS} or from the files that {INDEX} names",
                "copy the whole folder; convert pytorch_model.bin with save_pretrained",
            )
        yield from read_tensors(folder / file)


def _indexed(index: Path) -> list[str]:
    """The files that an index names, each in its own folder; CheckpointError for anything else."""
    table = _read_json(index).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(name, str) and _FILE.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{index} has no weight_map of tensors to .safetensors files beside it",
            "weights are read from the model's own folder only",
            "copy the whole folder again",
        )
    return sorted(set(names))


def _mismatch(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} in {folder}",
        "the weights must be exactly those that config.json describes",
        "use the config.json that was saved with these weights",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing", "a Hugging Face folder holds it", "give the model's folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no JSON: {error}", "the file is damaged", "copy the folder again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} is no JSON object", "the file is damaged", "copy the folder again"
        )
    return content


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
