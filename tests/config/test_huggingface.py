"""config.json both ways, against transformers' own configuration class."""

import json
from typing import Any

import pytest
from transformers import LlamaConfig

from lowmem.config.huggingface import (
    huggingface_config,
    huggingface_generation_config,
    model_config_from_huggingface,
)
from lowmem.config.schema import ModelConfig, RopeScaling
from lowmem.errors import ConfigError

FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "head_dim": 8,
    "initializer_range": 0.1,
}
LLAMA3 = RopeScaling(type="llama3", factor=4.0, original_max_position_embeddings=16)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "linear": {"rope_scaling": RopeScaling(type="linear", factor=2.0)},
    "tokens": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_survives_the_way_there_and_back(shape: str) -> None:
    config = ModelConfig(**{**FIELDS, **SHAPES[shape]})
    data = huggingface_config(config, "bfloat16")
    assert data["torch_dtype"] == "bfloat16"
    assert model_config_from_huggingface(json.loads(json.dumps(data))) == config
    assert model_config_from_huggingface(LlamaConfig(**data).to_dict()) == config


def test_both_ways_to_write_the_rotary_scheme_are_read() -> None:
    four = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    five = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    read = [
        model_config_from_huggingface({"model_type": "llama", **FIELDS, **form})
        for form in (four, five)
    ]
    assert read[0] == read[1]
    assert read[0].rope_theta == 5e5
    assert read[0].rope_scaling == RopeScaling(type="linear", factor=2.0)


def test_token_ids_that_are_lists_or_none_are_read() -> None:
    tokens = {"eos_token_id": [7, 8], "pad_token_id": -1, "bos_token_id": 0}
    config = model_config_from_huggingface({"model_type": "llama", **FIELDS, **tokens})
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 7, None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_other_models_are_refused_with_their_value(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        model_config_from_huggingface({"model_type": "llama", **FIELDS, **change})
    assert error.value.why
    assert error.value.fix


def test_the_generation_config_names_the_known_tokens() -> None:
    config = ModelConfig(**FIELDS, bos_token_id=0, eos_token_id=2)
    data = huggingface_generation_config(config)
    assert data == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 2}
