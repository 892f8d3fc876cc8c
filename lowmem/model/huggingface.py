"""Hugging Face folders: config.json read and written, weights loaded and saved tensor by tensor.

model = load_folder(Path("meta-llama"), torch.bfloat16, "cuda")
save_folder(model, Path("export"), tokenizer=None)     # AutoModelForCausalLM reads it
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lowmem.config.schema import Level, ModelConfig
from lowmem.errors import CheckpointError, ConfigError
from lowmem.model.llama import Llama
from lowmem.tensorfile import read_tensors, write_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ROPE_TYPES = ("default", "linear", "llama3")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_dropout": 0.0}


def model_config_from_huggingface(data: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json of transformers 4 or 5 describes.

    Of several end tokens (LLaMA 3) the first is taken. ConfigError: another model type, activation
    or rotary scheme, dropout, or fields that are missing or contradict each other.
    """
    for key, allowed in _FIXED.items():
        value = data.get(key, None if key == "model_type" else allowed)
        if value != allowed:
            raise ConfigError(
                f"{key} = {value!r} in config.json",
                f"lowmem trains LLaMA models: {key} must be {allowed!r}",
                "use the config.json of a LLaMA model, or a preset such as llama-60m",
            )
    known = {key: value for key, value in data.items() if key in ModelConfig.model_fields}
    for key in _TOKENS:
        known[key] = _one_token(data.get(key))
    known["rope_theta"], known["rope_scaling"] = _read_rope(data)
    try:
        return ModelConfig.model_validate(known)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            "config.json describes no LLaMA model: " + "; ".join(problems),
            "lowmem reads the fields of Hugging Face's LlamaConfig",
            "correct these fields, or use a preset such as llama-60m",
        ) from error


def _one_token(value: Any) -> Any:
    """The first of several; None for -1, by which early LLaMA configurations say "none"."""
    first = value[0] if isinstance(value, list) and value else value
    return None if first in ([], -1) else first


def _read_rope(data: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of `rope_parameters` (5) or of `rope_theta` and `rope_scaling` (4)."""
    rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    partial = rope.pop("partial_rotary_factor", None) or data.get("partial_rotary_factor") or 1.0
    if kind not in _ROPE_TYPES or partial != 1.0:
        what = f"rope_type = {kind!r}" if partial == 1.0 else f"partial_rotary_factor = {partial}"
        raise ConfigError(
            f"{what} in config.json",
            f"lowmem turns whole heads with rope_type {', '.join(_ROPE_TYPES)}",
            "remove the rotary scaling, or use a model with one of these",
        )
    rope.pop("type", None)
    if kind == "llama3":
        # transformers takes the length of the model where the original one is not named.
        rope.setdefault("original_max_position_embeddings", data.get("max_position_embeddings"))
    return theta, None if kind == "default" else {"type": kind, **rope}


def huggingface_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model, in the words of transformers 4, which 5 reads as well."""
    fields = config.model_dump(exclude={"rope_scaling"})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "rope_scaling": _write_rope(config),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _write_rope(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    own = {"type"} if scaling.type == "llama3" else set(type(scaling).model_fields) - {"factor"}
    return {"rope_type": scaling.type, **scaling.model_dump(exclude=own)}


def save_folder(
    model: Llama, folder: Path, tokenizer: Callable[[Path], None] | None = None
) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    The folder is made where it is missing. tokenizer: writes its own files into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    config = huggingface_config(model.config, weights[0][1].dtype)
    generation = {key: config[key] for key in _TOKENS if config[key] is not None}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    if tokenizer is not None:
        tokenizer(folder)


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


def _may_be_skipped(name: str, config: ModelConfig) -> bool:
    """A second copy of a tied head, and rotary tables that old versions of transformers stored."""
    tied = config.tie_word_embeddings and name == "lm_head.weight"
    return tied or name.endswith("rotary_emb.inv_freq")


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the folder's safetensors, one at a time."""
    if (folder / INDEX).exists():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
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


def _mismatch(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} in {folder}",
        "the weights must be exactly those that config.json describes",
        "use the config.json that was saved with these weights",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing", "a Hugging Face folder holds it", "give the model's folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no JSON: {error}", "the file is damaged", "copy the folder again"
        ) from error


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
