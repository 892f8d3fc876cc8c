"""Small tokenizers and texts for the tests of data."""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lowmem.data import assemble
from lowmem.data.assemble import ShardWriter
from lowmem.data.shards import TokenStream
from lowmem.data.tokenizer import Tokenizer, load_tokenizer, token_dtype

WORDS = ["the", "rank", "of", "a", "gradient", "falls", "while", "moments", "keep", "a", "basis"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and no network."""
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOWMEM_OFFLINE", "1")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 entries with `</s>`."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(documents(50, 0), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_folder))


def ids_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """What the tokenizer makes of each text."""
    return [np.frombuffer(ids, tokenizer.dtype).tolist() for ids in tokenizer.encode(texts)]


def documents(count: int, seed: int, words: int = 40) -> list[str]:
    """Different texts of about `words` words, some with newlines and letters beyond ASCII."""
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        chosen = rng.choices([*WORDS, "na\u00efve\n", "\u4e2d\u6587"], k=rng.randint(1, 2 * words))
        texts.append(f"{seed}.{number} " + " ".join(chosen))
    return texts


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    """JSON lines in the form of C4; packed if the name ends in .gz."""
    rows = (json.dumps({"text": text, "timestamp": "", "url": ""}) for text in texts)
    content = "".join(row + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
    return path


MakeStream = Callable[..., TokenStream]


@pytest.fixture
def make_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStream:
    """make_stream(tokens, shard_tokens=..., vocab_size=...): a TokenStream of these tokens."""

    def make(tokens: Sequence[int], shard_tokens: int = 7, vocab_size: int = 1000) -> TokenStream:
        monkeypatch.setattr(assemble, "SHARD_TOKENS", shard_tokens)
        dtype = token_dtype(vocab_size)
        writer = ShardWriter(tmp_path, "train", dtype, vocab_size, limit=None)
        writer.write(np.array(tokens, dtype), np.array([len(tokens)]))
        return TokenStream(tmp_path, writer.close(), dtype)

    return make
