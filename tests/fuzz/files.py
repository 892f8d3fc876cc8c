"""Damaged files: corpora, text, tokenizers, checkpoints, Hugging Face folders.

kinds(folder)      {"corpus": case, ...}; case(rng) damages a fresh copy and reads it whole
"""

import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import torch

from lowmem.config.defaults import settle
from lowmem.config.schema import Config
from lowmem.data.batches import Batches, validation_batches
from lowmem.data.prepare import prepare
from lowmem.data.shards import Corpus, open_corpus, verify_corpus
from lowmem.data.sources import Reader, find_inputs
from lowmem.data.tokenizer import load_tokenizer
from lowmem.model.huggingface import load_folder
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.train.build import build
from lowmem.train.checkpoint import model_folder, restore, save, signed, verify
from lowmem.train.run import Run
from lowmem.train.snapshot import Position
from tests.fuzz.mutation import changed_json, damaged, files_of

Case = Callable[[random.Random], object]
SEQ_LEN = 8
_MODEL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 32,
}
_ODD_LINES = (
    b'{"text": "\xff\xfe broken"}\n',
    b'{"text": "NUL \0 inside"}\n',
    b'{"text": "\\ud800"}\n',
    b'{"text": ' + b"[" * 5000 + b"\n",
    b'{"text": ' + b"9" * 5000 + b"}\n",
    b'{"other": 1}\n',
    b"[1, 2]\n",
    b"\n\n\r\n",
    b'{"text": "' + b"long " * 40_000 + b'"}\n',
    b"\xef\xbb\xbf",
)


def kinds(folder: Path) -> dict[str, Case]:
    """Every kind of case by name. folder: for the originals and one damaged copy."""
    made = _Originals(folder / "originals")
    place = folder / "copy"

    def on_copy(original: Path, read: Callable[[random.Random, Path], object]) -> Case:
        def case(rng: random.Random) -> object:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(original, place)
            return read(rng, place)

        return case

    return {
        "corpus": on_copy(made.corpus.folder, _corpus),
        "text": on_copy(made.text, _text),
        "tokenizer": on_copy(made.tokenizer, _tokenizer),
        "checkpoint": on_copy(made.run.folder, made.checkpoint),
        "forged checkpoint": on_copy(made.run.folder, made.forged),
        "model folder": on_copy(made.weights, _model_folder),
    }


def _damage_one(rng: random.Random, folder: Path) -> Path:
    """Change one file: as JSON where it is some, else byte by byte; sometimes remove it."""
    path = rng.choice(files_of(folder))
    content = path.read_bytes()
    if rng.random() < 0.03:
        path.unlink()
    elif path.suffix == ".json" and rng.random() < 0.6:
        _write_json(path, changed_json(rng, json.loads(content)))
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        path.write_bytes(_odd_header(rng, content))
    else:
        path.write_bytes(damaged(rng, content))
    return path


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value))
    except ValueError:  # a number with more digits than Python writes
        path.write_text("9" * 5000)


def _odd_header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header lies about its own size, or about the tensors."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        wrong = rng.choice([0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + content[8:]
    header = changed_json(rng, json.loads(content[8 : 8 + size]))
    try:
        text = json.dumps(header).encode()
    except ValueError:
        text = b"9" * 5000
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _corpus(rng: random.Random, folder: Path) -> None:
    _damage_one(rng, folder)
    corpus = open_corpus(folder)
    _read_whole(corpus)
    corpus.tokenizer()
    verify_corpus(folder)


def _read_whole(corpus: Corpus) -> None:
    if corpus.train is not None:
        batches = Batches(corpus.train, seq_len=SEQ_LEN, rows_per_update=2, seed=0)
        assert int(batches.of(0).rows.max()) < corpus.vocab_size
        corpus.train.read(0, corpus.train.tokens)
        corpus.train.unigram_loss()
    if corpus.validation is not None:
        assert list(validation_batches(corpus.validation, SEQ_LEN, 4, None))
        corpus.validation.unigram_loss(corpus.train)


def _text(rng: random.Random, folder: Path) -> None:
    path = _damage_one(rng, folder)
    if path.suffix == ".jsonl" and path.exists() and rng.random() < 0.5:
        lines = path.read_bytes().splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_ODD_LINES))
        path.write_bytes(b"".join(lines))
    for source in find_inputs(str(folder)):
        with closing(Reader(source, rng.choice(["text", "text", "other"])).lines()) as lines_read:
            for number, line in lines_read:
                assert number > 0
                assert isinstance(line, str) or line.why


def _tokenizer(rng: random.Random, folder: Path) -> None:
    _damage_one(rng, folder)
    tokenizer = load_tokenizer(str(folder))
    (encoded,) = tokenizer.encode(["The rank of a gradient falls. \u4e2d\n"])
    ids = np.frombuffer(encoded, tokenizer.dtype)
    assert (ids < tokenizer.vocab_size).all()
    tokenizer.decode(ids.tolist())


def _model_folder(rng: random.Random, folder: Path) -> None:
    _damage_one(rng, folder)
    load_folder(model_folder(folder), torch.float32, "cpu")


class _Originals:
    """Undamaged files of every kind, small."""

    def __init__(self, folder: Path) -> None:
        self.text, self.tokenizer = folder / "text", folder / "tokenizer"
        self.text.mkdir(parents=True)
        self.tokenizer.mkdir()
        _write_text(self.text)
        _write_tokenizer(self.tokenizer)
        tokenizer = load_tokenizer(str(self.tokenizer))
        self.corpus = prepare(str(self.text), tokenizer, folder / "corpus", workers=1)
        self._config = self._settled(folder)
        card = find_card("auto", "cpu")
        self._config = make_plan(self._config, card, []).config
        self.run = Run.create(self._config, None)
        self._model, self._optimizer, self._batches = self._built()
        self._model.initialise(0)
        for update in (1, 2):
            at = Position(update, update)
            save(self.run, self._model, self._optimizer, self._batches, self.corpus, at)
        self.weights = model_folder(self.run.folder)

    def _settled(self, folder: Path) -> Config:
        asked = {
            "model": _MODEL,
            "data": {"source": str(self.corpus.folder), "seq_len": SEQ_LEN},
            "optimizer": {"method": "galore", "rank": 2, "states": "8bit"},
            "train": {"updates": 4, "batch": "2seq", "device": "cpu"},
            "run": {"out": str(folder), "name": "run"},
        }
        return settle(Config.model_validate(asked), cuda=False)[0]

    def _built(self) -> tuple[Llama, Optimizer, Batches]:
        assert self.corpus.train is not None
        model, optimizer = build(self._config)
        batches = Batches(self.corpus.train, seq_len=SEQ_LEN, rows_per_update=2, seed=0)
        return model, optimizer, batches

    def checkpoint(self, rng: random.Random, folder: Path) -> None:
        """Any file of the run damaged."""
        newest = Run.open(folder).latest()
        before = {path: path.read_bytes() for path in files_of(newest)}
        path = _damage_one(rng, folder)
        missed = path in before and path.name != "manifest.json"
        missed = missed and not (path.exists() and path.read_bytes() == before[path])
        self._resumed(folder)
        assert not missed, f"{path} was changed, and nobody noticed"

    def forged(self, rng: random.Random, folder: Path) -> None:
        """A file of the newest checkpoint damaged, and the manifest made to agree."""
        newest = Run.open(folder).latest()
        manifest = newest / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["sha256"]
        _damage_one(rng, newest)
        for name, entry in content["files"].items():
            if (newest / name).is_file():
                data = (newest / name).read_bytes()
                entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(signed(content)))
        self._resumed(folder)

    def _resumed(self, folder: Path) -> None:
        run = Run.open(folder)
        run.metrics()
        newest = run.latest()
        verify(newest)
        model_folder(folder)
        model, optimizer, batches = self._model, self._optimizer, self._batches
        restore(newest, model, optimizer, batches, self.corpus)


def _write_text(folder: Path) -> None:
    texts = [f"{number} the rank of a gradient falls \u4e2d\u6587 " * 3 for number in range(40)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "train.jsonl").write_text(rows)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    (folder / "plain.txt").write_text("\n".join(texts))
    (folder / "valid.jsonl").write_text(rows[: len(rows) // 4].rpartition("\n")[0] + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "table.parquet")


def _write_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the rank of a gradient falls"], 300, special_tokens=["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
