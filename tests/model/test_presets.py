import tomllib
from importlib.resources import files

import pytest

from lowmem.config.schema import ModelConfig

FOLDER = files("lowmem") / "configs" / "models"
# millions, as the papers round them or as their shapes add up
PARAMETERS = {
    "tiny": 2.90,
    "9m": 9.00,
    "20m": 19.55,
    "35m": 35.20,
    "60m": 58.07,
    "130m": 134.1,
    "250m": 247.4,
    "350m": 368.0,
    "1b": 1339,
    "3b": 2686,
    "7b": 6738,
    "13b": 13016,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_papers_sizes(name: str) -> None:
    config = ModelConfig(**tomllib.loads((FOLDER / f"llama-{name}.toml").read_text()))
    assert config.parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=1e-3)
    assert config.vocab_size == (8192 if name == "tiny" else 32000)
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings


def test_no_preset_is_without_a_size() -> None:
    stems = {file.name.removesuffix(".toml") for file in FOLDER.iterdir()}
    assert stems == {f"llama-{name}" for name in PARAMETERS}
