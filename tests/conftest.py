"""What several tests need: a small real corpus, and no cache but their own."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from lowmem.config.defaults import settle
from lowmem.config.schema import Config
from lowmem.data.prepare import prepare
from lowmem.data.shards import Corpus
from lowmem.data.tokenizer import load_tokenizer
from lowmem.kernels.vector_math import settle_vector_math

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which others do too

TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True, scope="session")
def _quiet_machine() -> None:
    """Several test processes share the cores; the first exp of a process must be exact."""
    torch.set_num_threads(1)
    settle_vector_math()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data goes to a folder of this test run, never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny_text() -> Path:
    """A folder with 300 + 80 documents of C4 in its own layout."""
    return Path(__file__).parent / "c4"


def tiny_documents(folder: Path, split: str) -> list[str]:
    """The texts of one part of `tiny_text`."""
    (path,) = (folder / "en").glob(f"c4-{split}.*.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 400 entries."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        tiny_documents(tiny_text, "train"), vocab_size=400, special_tokens=["<|endoftext|>"]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(
    tiny_text: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Corpus:
    out = tmp_path_factory.mktemp("corpus")
    return prepare(str(tiny_text), load_tokenizer(str(tiny_tokenizer)), out, workers=1)


@pytest.fixture
def tiny_config(tiny_corpus: Corpus, tmp_path: Path) -> Callable[..., Config]:
    """tiny_config(optimizer={...}, train={...}): a configuration ready to be planned."""

    def make(**sections: Any) -> Config:
        train = {"updates": 6, "batch": "8seq", "device": "cpu"} | sections.pop("train", {})
        config = Config.model_validate(
            {
                "model": TINY_MODEL,
                "data": {"source": str(tiny_corpus.folder), "seq_len": 32},
                "evaluate": {"tokens": 2000},
                "run": {"out": str(tmp_path / "runs"), "name": "a"},
                "train": train,
            }
            | sections
        )
        return settle(config, cuda=False)[0]

    return make
