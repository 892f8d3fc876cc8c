"""Which model a name or a path means: presets, and config.json of Hugging Face folders."""

import json
import os
import tomllib
from importlib.resources import files
from pathlib import Path

from lowmem.config.huggingface import model_config_from_huggingface
from lowmem.config.schema import ModelConfig
from lowmem.errors import ConfigError, nearest, short_path


def preset_names() -> list[str]:
    """Every model that --model knows by name, smallest first."""
    sizes = {name: read_preset(name).parameters for name in _preset_files()}
    return sorted(sizes, key=sizes.__getitem__)


def read_preset(name: str) -> ModelConfig:
    """The preset of that name."""
    return ModelConfig.model_validate(tomllib.loads(_preset_files()[name]))


def resolve_model(spec: str | ModelConfig, base: Path) -> ModelConfig:
    """The model that `spec` names: a preset, or a config.json or its folder, relative to `base`.

    ConfigError: no such preset or file, or a config.json of something else than a LLaMA.
    """
    if isinstance(spec, ModelConfig):
        return spec
    if spec in _preset_files():
        return read_preset(spec)
    path = base / spec  # os.path, because pathlib raises where a name is too long
    path = path / "config.json" if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise _unknown_model(spec)
    return _read_config_json(path)


def _preset_files() -> dict[str, str]:
    """Preset name -> its TOML."""
    folder = files("lowmem") / "configs" / "models"
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def _read_config_json(path: Path) -> ModelConfig:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--model {path} cannot be read",
            f"{error}",
            "give the config.json of a Hugging Face LLaMA, or its folder",
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"--model {path} is no configuration",
            "a config.json holds one JSON object",
            "give the config.json of a Hugging Face LLaMA, or its folder",
        )
    return model_config_from_huggingface(data, path)


def _unknown_model(spec: str) -> ConfigError:
    names = preset_names()
    return ConfigError(
        f"--model {short_path(spec)} is neither a preset nor a file",
        f"presets: {', '.join(names)}",
        nearest(spec, names) or "a preset, or the path of a config.json or of its folder",
    )
