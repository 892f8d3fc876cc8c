"""Hugging Face folders: configuration and weights, loaded and saved tensor by tensor.

model = load_folder(Path("meta-llama"), torch.bfloat16, "cuda")
save_folder(model, Path("export"), tokenizer=None)     # AutoModelForCausalLM reads it

A model in 8-bit codes is saved in the same layout, but under a file name that only lowmem knows:
found as model.safetensors, transformers would miss its matrices and draw random ones instead.

write_floats(Path("checkpoint"), Path("export"))       # from codes what AutoModelForCausalLM reads
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem.config.huggingface import (
    huggingface_config,
    huggingface_generation_config,
    model_config_from_huggingface,
)
from lowmem.config.schema import ModelConfig
from lowmem.errors import CheckpointError
from lowmem.kernels.grouped_weight import Weight
from lowmem.model.int8 import GROUP
from lowmem.model.llama import Llama
from lowmem.tensorfile import Pending, read_tensor, read_tensors, tensor_names, write_tensors

WEIGHTS = "model.safetensors"
CODES = "lowmem-int8.safetensors"  # weights of a model in codes
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}\.safetensors")
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers refuses files without it


class SavedTokenizer(Protocol):
    """What a folder needs to know of the tokenizer: its files, and where a document ends."""

    @property
    def end_id(self) -> int: ...

    def files(self) -> dict[str, bytes]: ...


def save_folder(model: Llama, folder: Path, tokenizer: SavedTokenizer | None = None) -> None:
    """Write config.json, generation_config.json and the weights, and the tokenizer's files.

    The folder is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in folder_files(model, tokenizer).items():
        (folder / name).write_bytes(content)
    name, metadata = weights_file(model)
    write_tensors(folder / name, folder_weights(model), metadata)


def folder_files(model: Llama, tokenizer: SavedTokenizer | None = None) -> dict[str, bytes]:
    """Everything of a folder but the weights, by name.

    The end-of-document token becomes eos_token_id, so that generation stops at it.
    """
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    config = model.config
    if tokenizer is not None:
        config = config.model_copy(update={"eos_token_id": tokenizer.end_id})
    files = {
        "config.json": _json(huggingface_config(config, dtype)),
        "generation_config.json": _json(huggingface_generation_config(config)),
    }
    return files | tokenizer.files() if tokenizer is not None else files


def weights_file(model: Llama) -> tuple[str, dict[str, str]]:
    """Name and metadata of the file that holds the weights."""
    return (
        (CODES, {"format": "lowmem-int8", "group": str(GROUP)})
        if model.int8
        else (WEIGHTS, METADATA)
    )


def folder_weights(model: Llama) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what the file of the weights holds: codes where there are codes."""
    if model.residence is not None:
        model.residence.transfers.wait()
    return list(model.state_dict().items())


def load_folder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    recompute: str = "keep",
    attention: str = "auto",
) -> Llama:
    """The model of a Hugging Face folder, single file or sharded, cast to `dtype`.

    What is stored as codes stays codes, and `dtype` is that of the rest. One tensor at a time is in
    host memory. CheckpointError: a file, tensor or shape that does not match, by name; ConfigError:
    a config.json of another model.
    """
    path = folder / "config.json"
    config = model_config_from_huggingface(_read_json(path), path)
    _require_size(folder, config)
    model = Llama(
        config,
        dtype=dtype,
        device=device,
        int8=in_codes(folder),
        int8_ends=ends_in_codes(folder),
        recompute=recompute,
        attention=attention,
    )
    load_weights(model, folder)
    return model


def in_codes(folder: Path) -> bool:
    """Are the weights of this folder 8-bit codes?"""
    return (folder / CODES).is_file()


def ends_in_codes(folder: Path) -> bool:
    """Are embedding and head, too? CheckpointError: a damaged file."""
    return in_codes(folder) and "model.embed_tokens.codes" in tensor_names(folder / CODES)


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """Of the weights that are no codes, by a config.json. CheckpointError: another than floats."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise CheckpointError(
            f"weights of dtype {name!r}", f"allowed: {', '.join(dtypes)}", "convert the weights"
        )
    return dtypes[name]


def float_weights(folder: Path) -> list[tuple[str, Pending]]:
    """Every weight of a folder in codes as floats of its config.json's dtype, made one at a time.

    CheckpointError: a config.json or tensor that does not match; the latter when it is made.
    """
    path = folder / "config.json"
    data = _read_json(path)
    config, dtype = model_config_from_huggingface(data, path), dtype_of(data)
    ends = ends_in_codes(folder)
    shapes = Llama(config, dtype=dtype, device="meta", int8=True, int8_ends=ends, attention="cpu")
    return [
        (name, Pending(dtype, tuple(weight.shape), partial(_floats, folder, name, weight)))
        for name, weight in shapes.weights().items()
    ]


def _floats(folder: Path, name: str, expected: Weight) -> Tensor:
    """A weight that a folder in codes holds, in the dtype, and of the shape, that is expected."""

    def read(key: str, like: Tensor) -> Tensor:
        found = read_tensor(folder / CODES, key)
        if found.shape != like.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(like.shape)}"
            raise _mismatch(folder, f"{key} has shape {shapes}")
        return found.to(like.dtype)

    if isinstance(expected, Tensor):
        return read(name, expected)
    module = name.removesuffix("weight")
    found = replace(
        expected,
        codes=read(f"{module}codes", expected.codes),
        scales=read(f"{module}scales", expected.scales),
        zeros=read(f"{module}zeros", expected.zeros),
    )
    return found.values(expected.dtype)


def write_floats(folder: Path, out: Path) -> None:
    """Write the weights of a folder in codes to `out` as floats, one tensor in memory at a time."""
    write_tensors(out / WEIGHTS, float_weights(folder), {"format": "pt"})


@torch.no_grad()
def load_weights(model: Llama, folder: Path) -> None:
    """Copy the weights of a Hugging Face folder into `model`, strictly: codes only into codes.

    CheckpointError: a file, tensor or shape that does not match, by name.
    """
    wanted = model.state_dict()
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


@torch.no_grad()
def load_any_weights(model: Llama, folder: Path) -> float:
    """As `load_weights`, from floats or codes into either, each weight rounded once to the nearest.

    The result is the relative error, by the norm over all weights. CheckpointError: as there.
    """
    wanted = dict(model.weights())
    stored = (
        ((name, pending.make()) for name, pending in float_weights(folder))
        if in_codes(folder)
        else _stored(folder)
    )
    off = of = 0.0
    for name, values in stored:
        mine = wanted.pop(name, None)
        if mine is None:
            if not _may_be_skipped(name, model.config):
                raise _mismatch(folder, f"{name} is no weight of this model")
            continue
        if values.shape != mine.shape:
            shapes = f"{tuple(values.shape)} instead of {tuple(mine.shape)}"
            raise _mismatch(folder, f"{name} has shape {shapes}")
        exact = values.to(mine.device).float().contiguous()
        if isinstance(mine, Tensor):
            mine.copy_(exact)
            rounded = mine.float()
        else:
            mine.store(exact.clone())
            rounded = mine.values(torch.float32)
        off += (rounded - exact).square().sum(dtype=torch.float64).item()
        of += exact.square().sum(dtype=torch.float64).item()
    if wanted:
        raise _mismatch(folder, f"no tensor for {', '.join(sorted(wanted)[:5])}")
    return math.sqrt(off / of) if of else 0.0


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
    if in_codes(folder):
        files = [CODES]
    elif (folder / INDEX).exists():
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


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
