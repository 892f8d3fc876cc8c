"""Text becomes ids as text and nothing else."""

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from lowmem.data.tokenizer import load_tokenizer
from lowmem.errors import DataError
from tests.data.conftest import documents, ids_of

SPECIAL = "quoted </s> and <extra_id_5> and <pad>"


@pytest.fixture
def t5_like(tmp_path: Path) -> Path:
    """A Unigram model whose vocabulary holds the special tokens, as T5's does."""
    letters = sorted(set("".join(documents(50, 0)) + SPECIAL) - {" ", "\n"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581", -2.0)] + [(letter, -3.0) for letter in letters]
    extra = [f"<extra_id_{number}>" for number in range(10)]
    pieces += [(name, 0.0) for name in extra]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.add_special_tokens([AddedToken(name) for name in ["<pad>", "</s>", "<unk>", *extra]])
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def rewritten(folder: Path, target: Path, config: str | None = None, **changes: object) -> str:
    """A copy of a tokenizer with keys of its json changed."""
    content = json.loads((folder / "tokenizer.json").read_text())
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(content | changes))
    if config is not None:
        (target / "tokenizer_config.json").write_text(config)
    return str(target)


def test_special_names_in_text_are_text_for_a_unigram_model(t5_like: Path) -> None:
    tokenizer = load_tokenizer(str(t5_like))
    raw = tokenizers.Tokenizer.from_file(str(t5_like / "tokenizer.json"))
    first_extra = raw.get_vocab()["<extra_id_0>"]
    (ids,) = ids_of(tokenizer, [SPECIAL])
    assert max(ids) < first_extra
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.vocab_size == first_extra + 10
    plain = documents(20, 1)
    assert ids_of(tokenizer, plain) == [
        one.ids for one in raw.encode_batch(plain, add_special_tokens=False)
    ]


def test_special_names_in_text_are_text_for_bpe(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    (ids,) = ids_of(tokenizer, [SPECIAL])
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == SPECIAL


def test_a_pickled_tokenizer_encodes_the_same(t5_like: Path) -> None:
    tokenizer = load_tokenizer(str(t5_like))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert ids_of(copy, [SPECIAL]) == ids_of(tokenizer, [SPECIAL])
    assert (copy.fingerprint, copy.name) == (tokenizer.fingerprint, tokenizer.name)


def test_truncation_and_padding_of_the_file_are_ignored(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    texts = documents(5, 0)
    expected = ids_of(load_tokenizer(str(tokenizer_folder)), texts)
    assert ids_of(load_tokenizer(str(tmp_path)), texts) == expected


@pytest.mark.parametrize(
    ("config", "end"),
    [
        (None, "</s>"),
        ('{"eos_token": "!"}', "!"),
        ('{"eos_token": {"content": "!", "lstrip": false}}', "!"),
        ('{"eos_token": null}', "</s>"),
    ],
)
def test_the_end_token_is_the_named_one_or_a_usual_one(
    tokenizer_folder: Path, tmp_path: Path, config: str | None, end: str
) -> None:
    tokenizer = load_tokenizer(rewritten(tokenizer_folder, tmp_path / "t", config))
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert tokenizer.end_id == raw.token_to_id(end)


def test_a_missing_end_token_is_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    wrong = rewritten(tokenizer_folder, tmp_path / "t", '{"eos_token": "<none>"}')
    with pytest.raises(DataError, match=r"tokenizer t has no end-of-document token '<none>'"):
        load_tokenizer(wrong)
    model = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    model.save(str(tmp_path / "bare.json"))
    with pytest.raises(DataError, match="no end-of-document token") as caught:
        load_tokenizer(str(tmp_path / "bare.json"))
    assert "tokenizer_config.json" in caught.value.fix


def test_saved_folder_loads_in_transformers_and_here(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = documents(10, 3)
    expected = ids_of(tokenizer, texts)
    assert loaded(texts, add_special_tokens=False)["input_ids"] == expected
    assert loaded.eos_token_id == tokenizer.end_id
    assert load_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint
    assert tokenizer.decode(expected[0]) == texts[0]


def test_a_config_that_came_with_the_file_is_kept(tokenizer_folder: Path, tmp_path: Path) -> None:
    config = '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "!", "model_max_length": 77}'
    tokenizer = load_tokenizer(rewritten(tokenizer_folder, tmp_path / "t", config))
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text()) == json.loads(config)


@pytest.mark.parametrize("spec", ["./missing", "missing/tokenizer.json", "spiece.model"])
def test_a_missing_path_is_not_taken_for_a_hub_name(spec: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(spec)


def test_a_folder_without_tokenizer_says_how_to_convert(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json in") as caught:
        load_tokenizer(str(tmp_path))
    assert "save_pretrained" in caught.value.fix


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', '{"version": "1.0"}'])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="cannot read the tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in caught.value.what


def test_offline_a_hub_name_is_an_error_with_a_fix() -> None:
    with pytest.raises(DataError, match="'nobody/nothing' is no file or folder") as caught:
        load_tokenizer("nobody/nothing")
    assert "LOWMEM_OFFLINE" in caught.value.why
    assert "--tokenizer" in caught.value.fix
