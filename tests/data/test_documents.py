"""The papers' protocol: documents cut and padded, against Hugging Face's own preprocessing."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from lowmem.config.schema import DataConfig
from lowmem.data.documents import DocumentBatches, evaluation_steps
from lowmem.data.prepare import corpus_for, prepare
from lowmem.data.shards import Corpus, TokenStream, open_corpus, verify_corpus
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from tests.data.conftest import documents, write_lines

LENGTH = 24


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(3):
        write_lines(tmp_path / "c4" / f"c4-train.{number}.jsonl", documents(40, number))
    write_lines(tmp_path / "c4" / "c4-validation.jsonl", documents(30, 9))
    return tmp_path / "c4"


@pytest.fixture
def corpus(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> Corpus:
    return prepare(str(source), tokenizer, tmp_path / "rows", row_tokens=LENGTH, workers=1)


def train_of(corpus: Corpus) -> TokenStream:
    assert corpus.train is not None
    return corpus.train


def rows_of(stream: TokenStream) -> list[list[int]]:
    return [stream.read(int(a), int(b - a)).tolist() for a, b in pairwise(stream.starts)]


def test_documents_are_cut_as_hugging_face_cuts_them(
    corpus: Corpus, source: Path, tokenizer_folder: Path
) -> None:
    """Truncation keeps room for the end token, which every document has."""
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = raw.get_vocab()["</s>"]
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    raw.enable_truncation(LENGTH)
    texts = [json.loads(line)["text"] for p in source.glob("*train*") for line in p.open()]
    assert sorted(rows_of(train_of(corpus))) == sorted(raw.encode(text).ids for text in texts)
    assert {len(row) for row in rows_of(train_of(corpus))} >= {LENGTH}


def test_plain_files_are_documents_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number, text in enumerate(documents(6, 0)):
        path = tmp_path / "text" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([text] * 3))
    corpus = prepare(str(tmp_path / "text"), tokenizer, tmp_path / "out", row_tokens=8, workers=1)
    assert train_of(corpus).documents == 5  # one is validation
    assert all(len(row) == 8 for row in rows_of(train_of(corpus)))


def test_the_same_documents_are_held_out_as_of_packed_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_lines(tmp_path / "text" / "a.jsonl", documents(400, 1))
    packed, cut = (
        prepare(str(tmp_path / "text"), tokenizer, tmp_path / f"{n}", row_tokens=n, workers=1)
        for n in (None, 4000)
    )
    assert packed.validation is not None
    assert cut.validation is not None
    assert packed.validation.documents == cut.validation.documents > 1
    tokens = packed.validation.read(0, packed.validation.tokens)
    assert sorted(tokens) == sorted(cut.validation.read(0, cut.validation.tokens))


def test_updates_take_documents_in_the_order_of_the_stream(corpus: Corpus) -> None:
    stream = train_of(corpus)
    rows, end = rows_of(stream), stream.documents
    batches = DocumentBatches(stream, seq_len=LENGTH, rows_per_update=50)
    for update, wanted in ((0, range(50)), (2, [*range(100, end), *range(150 - end)])):
        batch = batches.of(update)
        assert batch.lengths is not None
        found = [row[:n].tolist() for row, n in zip(batch.rows, batch.lengths, strict=True)]
        assert found == [rows[document] for document in wanted]
        assert batch.tokens == sum(len(rows[document]) - 1 for document in wanted)
    halves = [
        DocumentBatches(stream, seq_len=LENGTH, rows_per_update=50, rank=rank, ranks=2).of(1)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([half.rows for half in halves]), batches.of(1).rows)
    assert {half.tokens for half in halves} == {batches.of(1).tokens}


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_every_target_comes_once_and_padding_never(
    corpus: Corpus, by_length: bool, size: int
) -> None:
    stream = train_of(corpus)
    batches = DocumentBatches(stream, seq_len=LENGTH, rows_per_update=50, by_length=by_length)
    pairs: list[tuple[int, int]] = []
    widths = []
    for inputs, targets in batches.of(0).micro_batches(size):
        assert inputs.shape == targets.shape
        kept = targets >= 0
        pairs += zip(inputs[kept].tolist(), targets[kept].tolist(), strict=True)
        widths.append(inputs.shape[1])
        assert int(kept.sum(1).max()) == inputs.shape[1] - 1  # nothing that all rows lack
    wanted = [pair for row in rows_of(stream)[:50] for pair in pairwise(row)]
    assert sorted(pairs) == sorted(wanted)
    assert len(pairs) == batches.of(0).tokens
    assert not by_length or widths == sorted(widths)


def test_evaluation_stops_after_the_step_that_is_too_many(corpus: Corpus) -> None:
    assert corpus.validation is not None
    lengths = np.diff(corpus.validation.starts)
    steps = list(evaluation_steps(corpus.validation, LENGTH, 4, 2, tokens=int(lengths[:8].sum())))
    assert [[len(one.rows.rows) for one in step] for step in steps] == [[4, 4], [4, 4]]
    every = list(evaluation_steps(corpus.validation, LENGTH, 4, 2, tokens=None))
    assert [[len(one.rows.rows) for one in step] for step in every] == [[4, 4]] * 3 + [[4, 2]]
    assert sum(one.tokens for step in every for one in step) == corpus.validation.tokens


def test_a_corpus_serves_one_protocol(
    corpus: Corpus, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    packed = prepare(str(source), tokenizer, tmp_path / "packed", workers=1)
    asked = DataConfig(source=str(corpus.folder), protocol="galore", seq_len=LENGTH)
    assert corpus_for(asked, 300).fingerprint == corpus.fingerprint
    for folder, change in (
        (packed.folder, {}),
        (corpus.folder, {"protocol": "lowmem"}),
        (corpus.folder, {"seq_len": LENGTH + 1}),
    ):
        wrong = asked.model_copy(update={"source": str(folder), **change})
        with pytest.raises(DataError, match="does not suit --protocol") as caught:
            corpus_for(wrong, 300)
        assert "lowmem data prepare TEXT --protocol" in caught.value.fix


def test_the_cache_keeps_both_protocols_apart(source: Path, tokenizer_folder: Path) -> None:
    packed = DataConfig(source=str(source), tokenizer=str(tokenizer_folder))
    cut = packed.model_copy(update={"protocol": "galore", "seq_len": LENGTH})
    folders = {corpus_for(config, 300).folder for config in (packed, cut, packed)}
    assert len(folders) == 2


def corrupted(corpus: Corpus, starts: Sequence[int]) -> Corpus:
    path = corpus.folder / "train-starts.bin"
    np.asarray(starts, "<i8").tofile(path)
    return open_corpus(corpus.folder)


def test_a_damaged_index_is_named(corpus: Corpus) -> None:
    verify_corpus(corpus.folder)
    starts = np.array(train_of(corpus).starts)
    starts[3] = starts[2]
    damaged = corrupted(corpus, starts.tolist())
    with pytest.raises(DataError, match=r"train-starts\.bin is damaged"):
        verify_corpus(corpus.folder)
    with pytest.raises(DataError, match="the index of documents"):
        DocumentBatches(train_of(damaged), seq_len=LENGTH, rows_per_update=8).of(0)
    with pytest.raises(DataError, match=r"train-starts\.bin has \d+ bytes"):
        corrupted(corpus, starts[:-1].tolist())


def test_a_limit_takes_the_beginning_of_the_stream(
    source: Path, tokenizer: Tokenizer, corpus: Corpus, tmp_path: Path
) -> None:
    some = prepare(
        str(source), tokenizer, tmp_path / "some", row_tokens=LENGTH, max_tokens=900, workers=1
    )
    stream = train_of(some)
    assert 900 - LENGTH < stream.tokens <= 900
    assert {len(row) > 1 and row[-1] == rows_of(stream)[0][-1] for row in rows_of(stream)} == {True}
