"""The corpus that is on every machine."""

import sysconfig
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from lowmem.config.schema import DataConfig
from lowmem.data import sample
from lowmem.data.prepare import corpus_for
from lowmem.data.sample import sample_corpus, sample_files, sample_source, sample_tokenizer
from lowmem.data.shards import Corpus
from lowmem.errors import DataError
from tests.data.conftest import ids_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Prepared once for this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_HOME", str(tmp_path_factory.mktemp("home")))
        corpus = corpus_for(DataConfig(), 8192)
        assert sample_corpus().folder == corpus.folder
        return corpus


def test_the_files_are_the_library_without_tests_in_order() -> None:
    named = sample_files()
    names = [name for name, _ in named]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    forbidden = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    assert not any(forbidden & set(name.split("/")) for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    assert all(path == root / name for name, path in named)


def test_about_one_file_in_twenty_is_validation() -> None:
    inputs, _ = sample_source()
    share = sum(one.split == "validation" for one in inputs) / len(inputs)
    assert 0.02 < share < 0.09


def test_the_tokens_are_the_source_of_the_library(corpus: Corpus) -> None:
    assert corpus.validation is not None
    assert corpus.train is not None
    tokenizer = corpus.tokenizer()
    for stream, split in ((corpus.validation, "validation"), (corpus.train, "train")):
        inputs, _ = sample_source()
        first = next(one for one in inputs if one.split == split and one.bytes > 1000)
        text = Path(first.path).read_bytes().decode()
        (ids,) = ids_of(tokenizer, [text])
        found = stream.read(0, min(stream.tokens, 4 * len(ids))).tolist()
        start = " ".join(map(str, found)).find(" ".join(map(str, ids[:200])))
        assert start >= 0
        assert tokenizer.decode(ids) == text
    assert corpus.manifest["splits"]["train"]["skipped"] == 0
    assert corpus.manifest["source"]["kind"] == "sample"


def test_its_tokenizer_is_small_and_lossless(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer()
    assert tokenizer.vocab_size == 8192
    text = "na\u00efve \u4e2d\u6587 \U0001f600\ttab\r\n  two  spaces <|endoftext|>"
    (ids,) = ids_of(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids


def test_training_the_tokenizer_twice_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = sample_source()
    monkeypatch.setattr(sample, "_TRAINED_ON_BYTES", 1_000_000)
    first, second = sample._trained(inputs), sample._trained(inputs)
    assert first.to_str() == second.to_str()
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(first.get_vocab())


def test_the_tokenizer_is_trained_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_TRAINED_ON_BYTES", 200_000)
    first = sample_tokenizer()

    def trained_again(_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(sample, "_trained", trained_again)
    assert sample_tokenizer().fingerprint == first.fingerprint


def test_a_python_without_its_source_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="needs the standard library's source"):
        sample_files()
