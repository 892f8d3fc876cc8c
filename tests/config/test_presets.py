"""What --model may name."""

import json
from pathlib import Path

import pytest

from lowmem.config.presets import preset_names, resolve_model
from lowmem.config.schema import ModelConfig
from lowmem.errors import ConfigError

PUBLISHED_MILLIONS = {  # arXiv:2403.03507, released configurations
    "llama-60m": 58.07,
    "llama-130m": 134.1,
    "llama-350m": 368.0,
    "llama-1b": 1339,
    "llama-7b": 6738,
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_presets_have_the_published_sizes(name: str) -> None:
    parameters = resolve_model(name, Path()).parameters
    assert parameters / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], rel=1e-3)  # 4 digits given


def test_presets_are_listed_from_small_to_large() -> None:
    names = preset_names()
    sizes = [resolve_model(name, Path()).parameters for name in names]
    assert sizes == sorted(sizes)
    assert {"llama-tiny", "llama-9m", "llama-13b", *PUBLISHED_MILLIONS} <= set(names)


def test_a_model_that_is_already_one_stays() -> None:
    model = resolve_model("llama-9m", Path())
    assert resolve_model(model, Path("/nowhere")) is model


def test_a_config_json_is_read_relative_to_the_base(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    expected = ModelConfig.model_validate(shape)
    for spec in ("mine", "mine/config.json", str(folder)):
        read = resolve_model(spec, tmp_path)
        assert {k: getattr(read, k) for k in shape} == {k: getattr(expected, k) for k in shape}


def test_unknown_names_list_the_presets_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match="llama-60mm") as caught:
        resolve_model("llama-60mm", Path())
    assert "llama-7b" in caught.value.why
    assert caught.value.fix == "did you mean `llama-60m`?"


@pytest.mark.parametrize(
    "change",
    [{"model_type": "qwen3"}, {"rope_scaling": {"rope_type": "yarn"}}, {"rope_scaling": [1]}, {}],
)
def test_a_config_json_of_another_model_is_refused_by_its_path(
    tmp_path: Path, change: dict[str, object]
) -> None:
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 0} | change))
    with pytest.raises(ConfigError) as caught:
        resolve_model("other", tmp_path)
    assert str(path) in caught.value.what


@pytest.mark.parametrize("text", ["[1, 2]", "{broken", "\x00"])
def test_a_config_json_of_nonsense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve_model("config.json", tmp_path)
    assert caught.value.fix
