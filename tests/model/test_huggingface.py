import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowmem.config.schema import ModelConfig, RopeScaling
from lowmem.errors import CheckpointError
from lowmem.model.huggingface import CODES, load_folder, load_weights, save_folder, write_floats
from lowmem.model.llama import Llama

TOKENS = torch.arange(24).reshape(2, 12)
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


class FakeTokenizer:
    """Writes one file; documents end with token 7."""

    end_id = 7

    def files(self) -> dict[str, bytes]:
        return {"t": b""}


def small(
    dtype: torch.dtype = torch.float32, int8: bool = False, int8_ends: bool = False, **changes: Any
) -> Llama:
    config = ModelConfig(**{**FIELDS, **changes})
    model = Llama(config, dtype=dtype, device="cpu", int8=int8, int8_ends=int8_ends)
    model.initialise(0)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_a_saved_folder(shape: str, tmp_path: Path) -> None:
    ours = small(**SHAPES[shape])
    save_folder(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        # float32, two blocks, logits of size 1
        torch.testing.assert_close(ours.logits(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_folder_is_read_back_unchanged(shape: str, tmp_path: Path) -> None:
    ours = small(**SHAPES[shape])
    save_folder(ours, tmp_path)
    again = load_folder(tmp_path, torch.float32, "cpu", recompute="attn")
    assert again.config == ours.config
    assert again.recompute == "attn"
    for name, parameter in ours.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_a_folder_of_transformers_is_read(tied: bool, shard: str, tmp_path: Path) -> None:
    theirs = LlamaForCausalLM(LlamaConfig(**FIELDS, tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    ours = load_folder(tmp_path, torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)


def test_weights_are_cast_to_the_wanted_dtype(tmp_path: Path) -> None:
    ours = small()
    save_folder(ours, tmp_path)
    rough = load_folder(tmp_path, torch.bfloat16, "cpu")
    for name, parameter in ours.named_parameters():
        assert torch.equal(rough.get_parameter(name), parameter.bfloat16())


def test_the_tokenizer_writes_into_the_folder(tmp_path: Path) -> None:
    save_folder(small(), tmp_path / "new", FakeTokenizer())
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["eos_token_id"] == 7
    assert (tmp_path / "new" / "t").exists()
    generation = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "eos_token_id": 7}


def damage(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    match how:
        case "config.json is no JSON":
            (folder / "config.json").write_text("{")
        case "model.safetensors is missing":
            (folder / "model.safetensors").unlink()
        case "cannot read":
            whole = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(whole[:-50])
        case "down_proj.weight has shape":
            config["intermediate_size"] = 54
            (folder / "config.json").write_text(json.dumps(config))
        case "no tensor for model.layers.2":
            config["num_hidden_layers"] = 3
            (folder / "config.json").write_text(json.dumps(config))
        case "model.layers.1":
            config["num_hidden_layers"] = 1
            (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how",
    [
        "config.json is no JSON",
        "model.safetensors is missing",
        "cannot read",
        "down_proj.weight has shape",
        "no tensor for model.layers.2",
        "model.layers.1",
    ],
)
def test_a_damaged_folder_is_refused_by_name(how: str, tmp_path: Path) -> None:
    save_folder(small(), tmp_path)
    damage(tmp_path, how)
    match = "has shape" if how.endswith("has shape") else how
    with pytest.raises(CheckpointError, match=match):
        load_folder(tmp_path, torch.float32, "cpu")
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_folder(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["plain", "tied", "biases"])
@pytest.mark.parametrize("ends", [False, True])
def test_codes_are_read_back_unchanged(
    ends: bool, shape: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours = small(dtype, int8=True, int8_ends=ends, **SHAPES[shape])
    save_folder(ours, tmp_path)
    again = load_folder(tmp_path, dtype, "cpu")
    assert (again.int8, again.int8_ends) == (True, ends)
    stored = again.state_dict()
    assert stored.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert stored[name].dtype == value.dtype
        assert torch.equal(stored[name], value), name


def test_transformers_refuses_codes_instead_of_drawing_random_weights(tmp_path: Path) -> None:
    save_folder(small(int8=True), tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["plain", "tied", "biases"])
@pytest.mark.parametrize("ends", [False, True])
def test_transformers_reads_what_codes_became(
    ends: bool, shape: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours = small(dtype, int8=True, int8_ends=ends, **SHAPES[shape])
    save_folder(ours, tmp_path / "codes")
    shutil.copytree(tmp_path / "codes", tmp_path / "floats", ignore=lambda *_: {CODES})
    write_floats(tmp_path / "codes", tmp_path / "floats")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", output_loading_info=True
    )
    assert not any(report.values())
    for name, weight in ours.weights().items():
        exact = weight if isinstance(weight, torch.Tensor) else weight.values()
        assert theirs.get_parameter(name).dtype == dtype
        assert torch.equal(theirs.get_parameter(name), exact.to(dtype)), name
    again = load_folder(tmp_path / "floats", dtype, "cpu")
    assert torch.equal(again.logits(TOKENS), ours.logits(TOKENS))


@pytest.mark.parametrize("into_codes", [False, True])
def test_codes_and_floats_are_not_mixed_up(into_codes: bool, tmp_path: Path) -> None:
    save_folder(small(int8=not into_codes), tmp_path)
    with pytest.raises(CheckpointError, match=r"_proj\.\w+ is no weight of this model"):
        load_weights(small(int8=into_codes), tmp_path)


@pytest.mark.parametrize("into_codes", [False, True])
def test_ends_in_codes_and_in_floats_are_not_mixed_up(into_codes: bool, tmp_path: Path) -> None:
    save_folder(small(int8=True, int8_ends=not into_codes), tmp_path)
    with pytest.raises(CheckpointError, match=r"\.\w+ is no weight of this model"):
        load_weights(small(int8=True, int8_ends=into_codes), tmp_path)


def test_codes_of_another_shape_do_not_become_floats(tmp_path: Path) -> None:
    save_folder(small(int8=True), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 54}))
    with pytest.raises(CheckpointError, match="codes has shape"):
        write_floats(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        {},
        {"a": 3},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "pytorch_model.bin"},
    ],
)
def test_an_index_names_safetensors_of_its_own_folder_only(table: Any, tmp_path: Path) -> None:
    save_folder(small(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_folder(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("int8", [False, True])
def test_a_config_of_more_weights_than_the_files_hold_makes_no_model(
    int8: bool, tmp_path: Path
) -> None:
    """Four codes to a float's bytes: a folder in codes is not taken for one that is too small."""
    save_folder(small(int8=int8), tmp_path)
    load_folder(tmp_path, torch.float32, "cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    with pytest.raises(CheckpointError, match=r"config\.json describes"):
        load_folder(tmp_path, torch.float32, "cpu")
