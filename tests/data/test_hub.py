"""C4 from the hub: the real reading code on local files, and what is said without a network."""

import socket
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from lowmem.config.schema import DataConfig
from lowmem.data import build, hub
from lowmem.data.pool import Progress
from lowmem.data.prepare import corpus_for, prepare
from lowmem.data.shards import is_corpus
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from tests.data.conftest import documents, write_lines


class LocalC4:
    """Stands for the hub: a folder in the layout of `allenai/c4`, which `datasets` opens by the
    very call that opens the hub's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        self.opened: list[str] = []
        self.taken = 0
        self.breaks_at: set[int] = set()
        for number in range(3):
            path = folder / "en" / f"c4-train.{number:05d}-of-00003.json.gz"
            write_lines(path, documents(30, number))
        write_lines(folder / "en" / "c4-validation.00000-of-00001.json.gz", documents(10, 99))
        original = datasets.load_dataset

        def load(name: str, *, data_files: Any, split: str, streaming: bool) -> Any:
            assert (name, streaming) == ("allenai/c4", True)
            self.opened.append(split)
            found = original(str(folder), data_files=data_files, split=split, streaming=True)
            return found.map(self._count)

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(hub, "C4_SHARDS", {"train": 3, "validation": 1})
        monkeypatch.setattr(hub, "PATIENCE", (0.0, 0.0))
        monkeypatch.setattr(hub, "require_network", lambda what, fix: None)
        monkeypatch.setenv("HF_HOME", str(folder / "hf"))

    def _count(self, row: dict[str, Any]) -> dict[str, Any]:
        self.taken += 1
        if self.taken in self.breaks_at:
            raise ConnectionError("the line went dead")
        return row


@pytest.fixture
def c4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalC4:
    return LocalC4(tmp_path / "hub", monkeypatch)


def expected(folder: Path, texts: list[str]) -> list[int]:
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = raw.get_vocab()["</s>"]
    return list(
        chain.from_iterable([*raw.encode(t, add_special_tokens=False).ids, end] for t in texts)
    )


TRAIN = [text for number in range(3) for text in documents(30, number)]


def test_the_stream_becomes_a_corpus(
    c4: LocalC4, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    seen: list[Progress] = []
    corpus = prepare("c4", tokenizer, tmp_path / "out", progress=seen.append)
    assert corpus.train is not None
    assert corpus.validation is not None
    assert corpus.train.read(0, corpus.train.tokens).tolist() == expected(tokenizer_folder, TRAIN)
    assert corpus.validation.read(0, corpus.validation.tokens).tolist() == expected(
        tokenizer_folder, documents(10, 99)
    )
    assert corpus.manifest["source"]["kind"] == "c4"
    assert seen[0].file == "allenai/c4 train"
    opened = list(c4.opened)
    prepare("c4", tokenizer, tmp_path / "out")
    assert c4.opened == opened  # the second time without the hub


def test_the_stream_is_bounded(
    c4: LocalC4, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    corpus = prepare("c4", tokenizer, tmp_path / "out", max_tokens=1000)
    assert corpus.train is not None
    assert corpus.validation is not None
    assert corpus.train.read(0, 1000).tolist() == expected(tokenizer_folder, TRAIN)[:1000]
    assert (corpus.train.tokens, corpus.validation.tokens) == (1000, 50)


def test_a_broken_stream_continues_where_it_broke(
    c4: LocalC4, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "STREAM_PIECE_TOKENS", 1000)
    monkeypatch.setattr("lowmem.data.pieces._BUFFERED_CHARACTERS", 500)
    whole = prepare("c4", tokenizer, tmp_path / "whole")
    c4.taken, c4.breaks_at = 0, set(range(60, 100))  # whatever is tried
    with pytest.raises(DataError, match="C4 cannot be read from the Hugging Face hub") as caught:
        prepare("c4", tokenizer, tmp_path / "out")
    assert "the line went dead" in caught.value.why
    assert not is_corpus(tmp_path / "out")
    c4.taken, c4.breaks_at = 0, set()
    again = prepare("c4", tokenizer, tmp_path / "out")
    assert again.fingerprint == whole.fingerprint
    assert c4.taken < 90  # documents of finished pieces are not mapped again


def test_a_stream_that_breaks_once_goes_on_by_itself(
    c4: LocalC4, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare("c4", tokenizer, tmp_path / "whole")
    waits: list[float] = []
    monkeypatch.setattr(hub, "PATIENCE", (0.25, 0.5))
    monkeypatch.setattr(hub, "_SURE_EVERY", 20)
    monkeypatch.setattr(hub, "C4Stream", partial(hub.C4Stream, sleep=waits.append))
    monkeypatch.setattr(build, "C4Stream", hub.C4Stream)
    c4.taken, c4.breaks_at = 0, {7, 50, 51}  # 51 while documents 41 to 42 are read again
    again = prepare("c4", tokenizer, tmp_path / "out")
    assert again.fingerprint == whole.fingerprint
    assert waits == [0.25, 0.25, 0.5]


def test_the_papers_stream_opens_files_as_datasets_shuffles_them(
    c4: LocalC4, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    """Few enough documents that the buffer holds them all: files first, then one permutation."""
    import datasets

    paths = [str(path) for path in sorted((tmp_path / "hub" / "en").glob("c4-train*"))]
    rows = datasets.Dataset.from_dict({"path": paths}).to_iterable_dataset(num_shards=3)
    opened = [row["path"] for row in rows.shuffle(seed=42, buffer_size=1)]
    texts = [text for path in opened for text in documents(30, paths.index(path))]

    corpus = prepare("c4", tokenizer, tmp_path / "out", row_tokens=16)
    assert corpus.train is not None
    raw = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = raw.get_vocab()["</s>"]
    cut = [[*raw.encode(text, add_special_tokens=False).ids[:15], end] for text in texts]
    order = np.arange(90)
    np.random.default_rng(42).shuffle(order)
    starts = corpus.train.starts
    found = [corpus.train.read(int(a), int(b - a)).tolist() for a, b in pairwise(starts)]
    assert opened != paths
    assert found == [cut[place] for place in order]


def test_train_reads_c4_once(c4: LocalC4, tokenizer_folder: Path) -> None:
    wanted = DataConfig(source="c4", tokenizer=str(tokenizer_folder))
    corpus = corpus_for(wanted, 300, max_tokens=500)
    opened = list(c4.opened)
    assert corpus_for(wanted, 300, max_tokens=500).folder == corpus.folder
    assert c4.opened == opened


@pytest.mark.parametrize("tokenizer_given", [True, False])
def test_offline_c4_names_the_commands_that_help(
    tokenizer_folder: Path, tokenizer_given: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    spec = str(tokenizer_folder) if tokenizer_given else "auto"
    with pytest.raises(DataError, match="C4 cannot be read") as caught:
        corpus_for(DataConfig(source="c4", tokenizer=spec), 32000)
    assert "LOWMEM_OFFLINE" in caught.value.why
    assert "lowmem data prepare" in caught.value.fix
    assert "--data sample" in caught.value.fix


def test_without_a_network_the_error_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> socket.socket:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("LOWMEM_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(DataError, match="what") as caught:
        hub.require_network("what", "fix")
    assert caught.value.why == "no connection to huggingface.co: Name or service not known"


@pytest.mark.parametrize(
    ("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_offline_is_asked_for_by_a_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, offline: bool
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("LOWMEM_OFFLINE", value)
    assert hub.is_offline() is offline
