"""Text becomes the tokens one expects, the same ones whatever happens on the way."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from lowmem.config.schema import DataConfig
from lowmem.data import build, pieces
from lowmem.data.jobs import PieceMaker
from lowmem.data.pieces import Piece
from lowmem.data.pool import Progress
from lowmem.data.prepare import corpus_for, prepare
from lowmem.data.shards import Corpus, TokenStream, is_corpus, open_corpus, verify_corpus
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from tests.data.conftest import documents, write_lines

FILES = 6


def all_of(stream: TokenStream | None) -> list[int]:
    return [] if stream is None else stream.read(0, stream.tokens).tolist()


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.fixture
def raw(tokenizer_folder: Path) -> tokenizers.Tokenizer:
    """The same tokenizer, used without lowmem."""
    return tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    """A small copy of allenai/c4: 6 training files of 40 documents, 1 of validation."""
    for number in range(FILES):
        name = f"en/c4-train.{number:05d}-of-{FILES:05d}.json.gz"
        write_lines(tmp_path / "c4" / name, documents(40, number))
    write_lines(tmp_path / "c4/en/c4-validation.00000-of-00001.json.gz", documents(10, 99))
    return tmp_path / "c4"


@pytest.fixture
def one_job_per_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "JOB_BYTES", 1)


def expected_ids(raw: tokenizers.Tokenizer, texts: list[str]) -> list[int]:
    end = raw.get_vocab()["</s>"]
    return list(
        chain.from_iterable([*raw.encode(t, add_special_tokens=False).ids, end] for t in texts)
    )


def test_c4_layout_gives_its_documents_in_order(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    corpus = prepare(str(c4), tokenizer, tmp_path / "out")
    texts = list(chain.from_iterable(documents(40, number) for number in range(FILES)))
    assert all_of(corpus.train) == expected_ids(raw, texts)
    assert all_of(corpus.validation) == expected_ids(raw, documents(10, 99))
    told = corpus.manifest
    assert told["splits"]["train"]["documents"] == 40 * FILES
    assert told["splits"]["train"]["skipped"] == 0
    assert told["largest_id"] == max(all_of(corpus.train) + all_of(corpus.validation))
    assert told["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert len(told["source"]["inputs"]) == FILES + 1
    counts = np.bincount(all_of(corpus.train), minlength=corpus.vocab_size)
    assert corpus.train is not None
    assert (corpus.train.counts == counts).all()
    verify_corpus(tmp_path / "out")
    assert not (tmp_path / "out/.pieces").exists()


@pytest.mark.usefixtures("one_job_per_file")
@pytest.mark.parametrize("max_tokens", [None, 3000])
def test_workers_change_nothing(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer, max_tokens: int | None
) -> None:
    for workers in (1, 3):
        seen: list[Progress] = []
        out = tmp_path / str(workers)
        prepare(
            str(c4), tokenizer, out, workers=workers, max_tokens=max_tokens, progress=seen.append
        )
        assert seen[-1].files == FILES + 1
        if max_tokens is None:
            assert seen[-1].files_done == FILES + 1
            assert seen[-1].bytes_done == seen[-1].bytes
            assert seen[-1].tokens == sum(
                split["tokens"] for split in open_corpus(out).manifest["splits"].values()
            )
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3")


@pytest.mark.usefixtures("one_job_per_file")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_prepare_continues(
    c4: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        if progress.files_done >= 3:
            raise Interrupted

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        prepare(str(c4), tokenizer, out, workers=workers, progress=interrupt)
    assert not is_corpus(out)
    with pytest.raises(DataError, match=r"no manifest\.json"):
        open_corpus(out)
    finished = len(list((out / ".pieces").glob("*.json")))
    assert 3 <= finished < FILES + 1
    redone = []
    original = PieceMaker._read

    def recorded(self: PieceMaker, reader: object, source: object, *rest: object) -> object:
        redone.append(source)
        return original(self, reader, source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PieceMaker, "_read", recorded)
    prepare(str(c4), tokenizer, out, workers=1)
    assert len(redone) == FILES + 1 - finished
    prepare(str(c4), tokenizer, tmp_path / "whole", workers=1)
    assert content_of(out) == content_of(tmp_path / "whole")


@pytest.mark.usefixtures("one_job_per_file")
def test_a_piece_of_changed_input_or_damaged_is_made_again(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.files_done >= 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(str(c4), tokenizer, out, progress=interrupt)
    write_lines(c4 / f"en/c4-train.00000-of-{FILES:05d}.json.gz", documents(3, 50))
    damaged = next((out / ".pieces").glob("train-00001*.tokens"))
    damaged.write_bytes(damaged.read_bytes()[:-2])
    prepare(str(c4), tokenizer, out)
    prepare(str(c4), tokenizer, tmp_path / "whole")
    assert content_of(out) == content_of(tmp_path / "whole")


SCRIPT = """
import os, signal, sys
from pathlib import Path
from lowmem.data import build
from lowmem.data.prepare import prepare
from lowmem.data.tokenizer import load_tokenizer
build.JOB_BYTES = 1
def kill(progress):
    if progress.files_done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    source, tokenizer, out, workers = sys.argv[1:]
    prepare(source, load_tokenizer(tokenizer), Path(out), workers=int(workers), progress=kill)
"""


@pytest.mark.usefixtures("one_job_per_file")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_prepare_continues(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, workers: int
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [str(c4), str(tokenizer_folder), str(tmp_path / "out"), str(workers)]
    command = [sys.executable, str(tmp_path / "script.py"), *arguments]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    # Output goes to pipes, so this also waits until no worker is left that holds them.
    killed = subprocess.run(command, env=os.environ | path, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not is_corpus(tmp_path / "out")
    assert list((tmp_path / "out/.pieces").glob("*.json"))
    prepare(str(c4), tokenizer, tmp_path / "out")
    prepare(str(c4), tokenizer, tmp_path / "whole")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_a_finished_prepare_is_only_opened(c4: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = prepare(str(c4), tokenizer, tmp_path / "out")
    (tmp_path / "out/train-00000.bin").touch()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    seen: list[Progress] = []
    again = prepare(str(c4), tokenizer, tmp_path / "out", progress=seen.append)
    assert again.fingerprint == first.fingerprint
    assert seen == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_nothing_of_others_is_overwritten(c4: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    prepare(str(c4), tokenizer, out)
    before = content_of(out)
    with pytest.raises(DataError, match="already holds another corpus") as caught:
        prepare(str(c4), tokenizer, out, max_tokens=100)
    assert "--out" in caught.value.fix
    assert content_of(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        prepare(str(c4), tokenizer, tmp_path / "full")
    with pytest.raises(DataError, match="is a file"):
        prepare(str(c4), tokenizer, tmp_path / "full/thesis.tex")
    assert content_of(tmp_path / "full") == {"thesis.tex": b"x"}
    with pytest.raises(DataError, match="is prepared already"):
        prepare(str(out), tokenizer, tmp_path / "other")


# Splits


def test_documents_are_held_out_by_their_text(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    texts = documents(1500, 1, words=4)
    shuffled = random.Random(0).sample(texts, len(texts))
    parts = []
    for name, order in (("a", texts), ("b", shuffled)):
        source = write_lines(tmp_path / f"{name}.jsonl", order)
        corpus = prepare(str(source), tokenizer, tmp_path / name)
        end = tokenizer.end_id
        validation = " ".join(map(str, all_of(corpus.validation))).split(f" {end}")[:-1]
        train = " ".join(map(str, all_of(corpus.train))).split(f" {end}")[:-1]
        parts.append({line.strip() for line in validation})
        assert len(train) + len(validation) == 1500
        everything = sorted(line.strip() for line in train + validation)
        assert everything == sorted(
            " ".join(map(str, raw.encode(text, add_special_tokens=False).ids)) for text in texts
        )
    assert parts[0] == parts[1]
    assert 5 <= len(parts[0]) <= 30  # binomial(1500, 0.01): outside with p < 1e-3


@pytest.mark.parametrize("count", [2, 3, 7])
def test_few_documents_still_give_one_to_validation(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer, count: int
) -> None:
    texts = documents(count, 4)
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus = prepare(str(tmp_path), tokenizer, tmp_path / "out")
    held = all_of(corpus.validation)
    number = [expected_ids(raw, [text]) for text in texts].index(held)
    assert all_of(corpus.train) == expected_ids(raw, texts[:number] + texts[number + 1 :])


def test_if_all_documents_fall_to_validation_one_returns(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_HELD_OUT_EVERY", 1)
    corpus = prepare(
        str(write_lines(tmp_path / "a.jsonl", documents(5, 0))), tokenizer, tmp_path / "o"
    )
    assert [corpus.manifest["splits"][name]["documents"] for name in ("train", "validation")] == [
        1,
        4,
    ]


def test_the_only_document_gives_its_end_to_validation(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    text = "\n".join(documents(100, 1))
    (tmp_path / "book.txt").write_text(text)
    corpus = prepare(str(tmp_path / "book.txt"), tokenizer, tmp_path / "out")
    expected = expected_ids(raw, [text])
    assert all_of(corpus.train) + all_of(corpus.validation) == expected
    assert len(all_of(corpus.validation)) == len(expected) // 20


def test_a_source_of_validation_files_has_no_training_part(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    texts = documents(20, 1)
    source = write_lines(tmp_path / "validation.jsonl.gz", texts)
    corpus = prepare(str(source), tokenizer, tmp_path / "out")
    assert corpus.train is None
    assert all_of(corpus.validation) == expected_ids(raw, texts)
    assert open_corpus(tmp_path / "out").train is None


@pytest.mark.usefixtures("one_job_per_file")
def test_max_tokens_cuts_exactly(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    corpus = prepare(str(c4), tokenizer, tmp_path / "out", max_tokens=5000)
    texts = list(chain.from_iterable(documents(40, number) for number in range(FILES)))
    expected = expected_ids(raw, texts)[:5000]
    assert len(expected) == 5000
    assert all_of(corpus.train) == expected
    assert all_of(corpus.validation) == expected_ids(raw, documents(10, 99))[:250]
    ends = expected.count(tokenizer.end_id) + (expected[-1] != tokenizer.end_id)
    assert corpus.manifest["splits"]["train"]["documents"] == ends


# Documents


def test_long_documents_are_encoded_in_parts_that_join(
    tmp_path: Path,
    tokenizer: Tokenizer,
    raw: tokenizers.Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "FRAGMENT_CHARACTERS", 50)
    monkeypatch.setattr(pieces, "_BUFFERED_CHARACTERS", 120)
    texts = [*documents(30, 1), "x" * 333, "y z " * 40]
    source = write_lines(tmp_path / "validation.jsonl", texts)
    corpus = prepare(str(source), tokenizer, tmp_path / "out")
    tokens = all_of(corpus.validation)
    assert raw.decode(tokens, skip_special_tokens=False).split("</s>")[:-1] == texts


def test_empty_documents_are_left_out(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    write_lines(tmp_path / "val/a.jsonl", ["one", "", " \n ", "two"])
    (tmp_path / "val/b.txt").write_text("")
    (tmp_path / "val/c.txt").write_text("\n \n")
    (tmp_path / "val/d.txt").write_text("three\n")
    corpus = prepare(str(tmp_path), tokenizer, tmp_path / "out")
    assert all_of(corpus.validation) == expected_ids(raw, ["one", "two", "three\n"])
    assert corpus.manifest["splits"]["validation"]["skipped"] == 0


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_corpus_is_an_error(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"no text in a\.jsonl"):
        prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out")
    assert not is_corpus(tmp_path / "out")


# Bad input


@pytest.fixture
def bad_lines(tmp_path: Path) -> Path:
    good = [json.dumps({"text": text}).encode() for text in documents(6, 1)]
    lines = [*good[:3], b"{broken", b'{"text": 7}', *good[3:], b'{"text": "\xff"}']
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/validation.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path / "bad"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_ends_it_with_file_and_line(
    bad_lines: Path, tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    write_lines(bad_lines / "train.jsonl", documents(3, 2))
    with pytest.raises(DataError, match=r"bad/validation\.jsonl:4: is not JSON") as caught:
        prepare(str(bad_lines), tokenizer, tmp_path / "out", workers=workers)
    assert "--skip-bad" in caught.value.fix
    assert not is_corpus(tmp_path / "out")


def test_bad_lines_are_counted_when_asked(
    bad_lines: Path, tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    corpus = prepare(str(bad_lines), tokenizer, tmp_path / "out", skip_bad=True)
    assert all_of(corpus.validation) == expected_ids(raw, documents(6, 1))
    assert corpus.manifest["splits"]["validation"]["skipped"] == 3
    assert ":4: is not JSON" in corpus.manifest["source"]["skipped_first"][0]
    assert re.fullmatch(r"3 lines were skipped, the first: .*:4: is not JSON .*", corpus.skipped)


def test_a_bad_line_of_plain_text_is_dropped_when_asked(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    (tmp_path / "test.txt").write_bytes(b"one\ntw\xff\nthree\0\nfour\n")
    with pytest.raises(DataError, match=r"test\.txt:2: is not UTF-8"):
        prepare(str(tmp_path / "test.txt"), tokenizer, tmp_path / "out")
    corpus = prepare(str(tmp_path / "test.txt"), tokenizer, tmp_path / "skip", skip_bad=True)
    assert all_of(corpus.validation) == expected_ids(raw, ["one\nfour\n"])
    assert corpus.manifest["splits"]["validation"]["skipped"] == 2


def test_a_cut_gzip_file_is_an_error_or_counts_one(
    tmp_path: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer
) -> None:
    texts = documents(2000, 1)
    path = write_lines(tmp_path / "validation.json.gz", texts)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"validation\.json\.gz:\d+: the gzip stream is damaged"):
        prepare(str(path), tokenizer, tmp_path / "out")
    corpus = prepare(str(path), tokenizer, tmp_path / "skip", skip_bad=True)
    told = corpus.manifest["splits"]["validation"]
    assert told["skipped"] == 1
    assert 1500 < told["documents"] < 2000
    assert all_of(corpus.validation) == expected_ids(raw, texts[: told["documents"]])


def test_only_bad_lines_are_an_error_even_when_skipped(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(DataError, match=r"no text in a\.jsonl") as caught:
        prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "out", skip_bad=True)
    assert "2 lines were skipped" in caught.value.why


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(c4: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    next(c4.glob("en/*")).chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        prepare(str(c4), tokenizer, tmp_path / "out")


def test_a_full_disk_is_told(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Piece:
        raise OSError(28, "No space left on device", "piece")

    monkeypatch.setattr("lowmem.data.pieces.PieceWriter.finish", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(str(c4), tokenizer, tmp_path / "out")


# What training opens


def config(source: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(source=str(source), **settings)


def test_train_prepares_once_into_the_cache(c4: Path, home: Path, tokenizer_folder: Path) -> None:
    before = sorted(c4.rglob("*"))
    wanted = config(c4, tokenizer=str(tokenizer_folder))
    seen: list[Progress] = []
    first = corpus_for(wanted, 300, progress=seen.append)
    assert first.folder.is_relative_to(home)
    assert sorted(c4.rglob("*")) == before
    assert seen
    seen.clear()
    assert corpus_for(wanted, 300, progress=seen.append).folder == first.folder
    assert seen == []


def test_ranks_that_start_together_prepare_once(
    c4: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = PieceMaker.make

    def counted(self: PieceMaker, *given: Any) -> Piece:
        read.append(given[0])
        return original(self, *given)

    monkeypatch.setattr(PieceMaker, "make", counted)
    wanted = config(c4, tokenizer=str(tokenizer_folder))
    with ThreadPoolExecutor(4) as ranks:
        corpora = list(ranks.map(lambda _: corpus_for(wanted, 300), range(4)))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert len(read) == len(set(read))


def test_changed_input_or_options_are_prepared_anew(c4: Path, tokenizer_folder: Path) -> None:
    def opened(**settings: object) -> Corpus:
        return corpus_for(config(c4, tokenizer=str(tokenizer_folder), **settings), 300)

    first = opened()
    assert opened(skip_bad=True).folder != first.folder
    path = c4 / f"en/c4-train.00003-of-{FILES:05d}.json.gz"
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert opened().folder != first.folder
    assert opened().fingerprint == first.fingerprint
    path.write_bytes(gzip.compress(b'{"text": "another"}'))
    assert opened().fingerprint != first.fingerprint


def test_prepared_shards_are_opened_where_they_are(
    c4: Path, tmp_path: Path, home: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    prepare(str(c4), tokenizer, tmp_path / "out")
    assert corpus_for(config(tmp_path / "out"), 300).folder == tmp_path / "out"
    same = config(tmp_path / "out", tokenizer=str(tokenizer_folder))
    assert corpus_for(same, 300).folder == tmp_path / "out"
    assert not home.exists()


def test_the_hubs_name_of_the_shards_tokenizer_needs_no_connection(
    c4: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recipes say t5-base, and shards that were prepared with a copy of it have it."""
    prepare(str(c4), tokenizer, tmp_path / "out")

    def unreachable(*_: object) -> Path:
        raise DataError("no connection", "", "")

    monkeypatch.setattr("lowmem.data.tokenizer.hub_file", unreachable)
    named = config(tmp_path / "out", tokenizer=tokenizer.name)
    assert corpus_for(named, 300).folder == tmp_path / "out"
    with pytest.raises(DataError, match="no connection"):
        corpus_for(config(tmp_path / "out", tokenizer="another"), 300)
    monkeypatch.chdir(tmp_path)
    (tmp_path / tokenizer.name).mkdir()  # where the same name is a folder, that is read
    (tmp_path / tokenizer.name / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        corpus_for(named, 300)


def test_another_tokenizer_than_the_shards_have_is_refused(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    prepare(str(c4), tokenizer, tmp_path / "out")
    other = (tokenizer_folder / "tokenizer.json").read_text() + " "
    (tmp_path / "other.json").write_text(other)
    with pytest.raises(DataError, match=r"was prepared with tokenizer .*, not with .*other\.json"):
        corpus_for(config(tmp_path / "out", tokenizer=str(tmp_path / "other.json")), 300)


def test_only_ids_that_occur_must_fit_the_model(
    c4: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    corpus = prepare(str(c4), tokenizer, tmp_path / "out")
    largest = corpus.manifest["largest_id"]
    assert corpus_for(config(tmp_path / "out"), largest + 1).fingerprint == corpus.fingerprint
    with pytest.raises(DataError, match=f"has 300 ids, the model has {largest}") as caught:
        corpus_for(config(tmp_path / "out"), largest)
    assert f"id {largest} occurs" in caught.value.why
    assert f"vocab_size {largest + 1} or more" in caught.value.fix


def test_an_end_token_that_the_model_lacks_is_told_before_text_is_read(
    c4: Path, tmp_path: Path, raw: tokenizers.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-2's, which is the last of its ids."""
    raw.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "ends").mkdir()
    raw.save(str(tmp_path / "ends" / "tokenizer.json"))
    told = json.dumps({"eos_token": "<|endoftext|>"})
    (tmp_path / "ends" / "tokenizer_config.json").write_text(told)
    asked = config(c4, tokenizer=str(tmp_path / "ends"))
    assert corpus_for(asked, 301).manifest["largest_id"] == 300
    monkeypatch.setattr("lowmem.data.prepare.build_corpus", None)
    with pytest.raises(DataError, match="has 301 ids, the model has 300") as caught:
        corpus_for(asked, 300)
    assert "id 300, <|endoftext|>, ends every document" in caught.value.why
    assert "vocab_size 301 or more" in caught.value.fix


def test_a_wrong_source_is_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing does not exist"):
        corpus_for(config(tmp_path / "missing", tokenizer=str(tokenizer_folder)), 300)


def test_a_cache_that_cannot_be_written_is_an_error(
    c4: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot write") as caught:
        corpus_for(config(c4, tokenizer=str(tokenizer_folder)), 300)
    assert "LOWMEM_HOME" in caught.value.fix
