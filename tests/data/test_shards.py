"""Shards read back exactly, and anything wrong with them is found and named."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lowmem.data.prepare import prepare
from lowmem.data.shards import Corpus, is_corpus, open_corpus, verify_corpus
from lowmem.data.tokenizer import Tokenizer, token_dtype
from lowmem.errors import DataError
from tests.data.conftest import MakeStream, documents, write_lines


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: Tokenizer) -> Corpus:
    source = write_lines(tmp_path / "text.jsonl", documents(30, 1))
    return prepare(str(source), tokenizer, tmp_path / "corpus")


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
@pytest.mark.parametrize("shard_tokens", [1, 3, 7, 50])
def test_reads_cross_the_borders_of_shards(
    make_stream: MakeStream, shard_tokens: int, vocab_size: int
) -> None:
    tokens = [(number * 7919) % vocab_size for number in range(25)]
    stream = make_stream(tokens, shard_tokens, vocab_size)
    for start in range(26):
        for count in range(26 - start):
            found = stream.read(start, count)
            assert found.dtype == np.int64
            assert found.tolist() == tokens[start : start + count]


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 26), (25, 1), (3, -1)])
def test_reads_outside_the_stream_are_refused(
    make_stream: MakeStream, start: int, count: int
) -> None:
    with pytest.raises(ValueError, match="of a stream of 25"):
        make_stream(range(25)).read(start, count)


@pytest.mark.parametrize(("vocab_size", "width"), [(1, 2), (65536, 2), (65537, 4), (256000, 4)])
def test_the_type_on_disk_is_the_smallest_that_fits(vocab_size: int, width: int) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == width
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_unigram_loss_is_the_entropy_of_the_tokens(make_stream: MakeStream) -> None:
    tokens = [1, 1, 1, 2, 2, 9, 9, 9, 9, 500]
    shares = [count / 10 for count in Counter(tokens).values()]
    expected = -sum(share * math.log(share) for share in shares)
    assert make_stream(tokens).unigram_loss() == pytest.approx(expected, rel=1e-12)
    assert f"{make_stream([5] * 20).unigram_loss():.4f}" == "0.0000"  # not -0.0000


def test_unigram_loss_under_training_frequencies(tmp_path: Path, corpus: Corpus) -> None:
    assert corpus.train is not None
    assert corpus.validation is not None
    train = Counter(corpus.train.read(0, corpus.train.tokens).tolist())
    tokens = corpus.validation.read(0, corpus.validation.tokens).tolist()
    total = corpus.train.tokens + corpus.vocab_size
    expected = -sum(math.log((train[token] + 1) / total) for token in tokens) / len(tokens)
    assert corpus.validation.unigram_loss(corpus.train) == pytest.approx(expected, rel=1e-12)


def test_a_moved_corpus_is_the_same_corpus(tmp_path: Path, corpus: Corpus) -> None:
    moved = shutil.copytree(corpus.folder, tmp_path / "elsewhere")
    again = open_corpus(moved)
    assert again.fingerprint == corpus.fingerprint
    assert again.tokenizer().fingerprint == corpus.manifest["tokenizer"]["fingerprint"]
    assert again.vocab_size == again.tokenizer().vocab_size


def test_verify_accepts_what_was_written(corpus: Corpus) -> None:
    found = verify_corpus(corpus.folder)
    names = [p for p in corpus.folder.iterdir() if p.suffix == ".bin" or p.name == "tokenizer.json"]
    assert found.files == len(names)
    assert found.bytes == sum(path.stat().st_size for path in names)


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "validation-00000.bin", "train-counts.bin", "tokenizer.json"]
)
def test_verify_finds_a_flipped_bit(corpus: Corpus, name: str) -> None:
    path = corpus.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged") as caught:
        verify_corpus(corpus.folder)
    assert name in caught.value.what


@pytest.mark.parametrize("name", ["train-00000.bin", "train-counts.bin", "tokenizer.json"])
def test_open_finds_a_missing_file(corpus: Corpus, name: str) -> None:
    (corpus.folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_corpus(corpus.folder)


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_open_finds_a_shard_of_wrong_size(corpus: Corpus, change: int) -> None:
    path = corpus.folder / "train-00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(DataError, match=r"train-00000\.bin has \d+ bytes"):
        open_corpus(corpus.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json"),
        ("{", "cannot read"),
        ("[]", "is not a manifest"),
        ('{"format": "other"}', "is not a manifest"),
        ('{"format": "lowmem tokens", "schema_version": 99}', "schema_version 99"),
        ('{"format": "lowmem tokens", "schema_version": 1}', "lacks or misuses 'dtype'"),
    ],
)
def test_open_tells_what_is_wrong_with_a_manifest(
    corpus: Corpus, content: str | None, message: str
) -> None:
    path = corpus.folder / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message):
        open_corpus(corpus.folder)


def test_a_foreign_manifest_is_no_corpus(tmp_path: Path) -> None:
    assert not is_corpus(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    assert not is_corpus(tmp_path)


def test_a_damaged_manifest_of_ours_is_not_taken_for_text(corpus: Corpus) -> None:
    (corpus.folder / "manifest.json").write_text("{")
    assert is_corpus(corpus.folder)


def test_rows_at_once_are_the_rows_one_by_one(make_stream: MakeStream) -> None:
    """Inside shards and across their borders, in any order."""
    stream = make_stream(list(range(40)), shard_tokens=7)
    starts = np.array([30, 0, 5, 6, 7, 13, 35])
    wanted = [stream.read(int(start), 5).tolist() for start in starts]
    assert stream.read_rows(starts, 5).tolist() == wanted
    assert stream.read_rows(starts[:1], 5).dtype == np.int64
