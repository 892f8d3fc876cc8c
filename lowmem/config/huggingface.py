"""Hugging Face's config.json as a ModelConfig and back: dicts only, no files and no torch.

model_config_from_huggingface(json.loads(path.read_text()))
huggingface_config(config, "bfloat16")
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem.config.problems import wrong_values
from lowmem.config.schema import ModelConfig
from lowmem.errors import ConfigError, short

_ROPE_TYPES = ("default", "linear", "llama3")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_dropout": 0.0}


def model_config_from_huggingface(
    data: dict[str, Any], where: Path | str = "config.json"
) -> ModelConfig:
    """The shape that a config.json of transformers 4 or 5 describes.

    where: its path, for errors. Of several end tokens (LLaMA 3) the first is taken. ConfigError:
    another model type, activation or rotary scheme, dropout, or fields that are missing or
    contradict each other.
    """
    for key, allowed in _FIXED.items():
        value = data.get(key, None if key == "model_type" else allowed)
        if value != allowed:
            raise ConfigError(
                f"{key} = {short(repr(value))} in {where}",
                f"lowmem trains LLaMA models: {key} must be {allowed!r}",
                "use the config.json of a LLaMA model, or a preset such as llama-60m",
            )
    known = {key: value for key, value in data.items() if key in ModelConfig.model_fields}
    for key in _TOKENS:
        known[key] = _one_token(data.get(key))
    known["rope_theta"], known["rope_scaling"] = _read_rope(data, where)
    try:
        return ModelConfig.model_validate(known)
    except ValidationError as error:
        reasons = wrong_values(error, "model")
        told = [f"{key.removeprefix('model.')}: {why}" for key, why in reasons.items()]
        raise ConfigError(
            f"{where} describes no LLaMA model: {short('; '.join(told), 300)}",
            "lowmem reads the fields of Hugging Face's LlamaConfig",
            "correct these fields, or use a preset such as llama-60m",
        ) from error


def _one_token(value: Any) -> Any:
    """The first of several; None for -1, by which early LLaMA configurations say "none"."""
    first = value[0] if isinstance(value, list) and value else value
    return None if first in ([], -1) else first


def _read_rope(data: dict[str, Any], where: Path | str) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of `rope_parameters` (5) or of `rope_theta` and `rope_scaling` (4)."""
    told = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(told, dict):
        raise ConfigError(
            f"rope_parameters = {short(repr(told))} in {where}",
            "rope_parameters and rope_scaling are objects or null",
            "correct the file, or use a preset such as llama-60m",
        )
    rope = dict(told)
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    partial = rope.pop("partial_rotary_factor", None) or data.get("partial_rotary_factor") or 1.0
    if kind not in _ROPE_TYPES or partial != 1.0:
        what = f"rope_type = {short(repr(kind))}"
        if partial != 1.0:
            what = f"partial_rotary_factor = {short(repr(partial))}"
        raise ConfigError(
            f"{what} in {where}",
            f"lowmem turns whole heads with rope_type {', '.join(_ROPE_TYPES)}",
            "remove the rotary scaling, or use a model with one of these",
        )
    rope.pop("type", None)
    if kind == "llama3":
        # transformers takes the length of the model where the original one is not named.
        rope.setdefault("original_max_position_embeddings", data.get("max_position_embeddings"))
    return theta, None if kind == "default" else {"type": kind, **rope}


def huggingface_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in the words of transformers 4, which 5 reads as well.

    dtype: of the weights, by torch's name, such as "bfloat16".
    """
    fields = config.model_dump(exclude={"rope_scaling"})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "rope_scaling": _write_rope(config),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _write_rope(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    own = {"type"} if scaling.type == "llama3" else set(type(scaling).model_fields) - {"factor"}
    return {"rope_type": scaling.type, **scaling.model_dump(exclude=own)}


def huggingface_generation_config(config: ModelConfig) -> dict[str, Any]:
    """The generation_config.json that goes with it: the token ids that are known."""
    known = {key: value for key in _TOKENS if (value := getattr(config, key)) is not None}
    return {"_from_model_config": True, **known}
