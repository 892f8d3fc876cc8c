"""What several tests need: a small real corpus, and no cache but their own."""

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
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with c4-train and c4-validation JSON lines: the project's own sources."""
    folder = tmp_path_factory.mktemp("text")
    sources = sorted((Path(__file__).parent.parent / "lowmem").rglob("*.py"))
    lines = [json.dumps({"text": path.read_text("utf-8")}) + "\n" for path in sources]
    (folder / "c4-validation.jsonl").write_text("".join(lines[::5]))
    (folder / "c4-train.jsonl").write_text(
        "".join(line for place, line in enumerate(lines) if place % 5)
    )
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 400 entries."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train(
        [str(tiny_text / "c4-train.jsonl")], vocab_size=400, special_tokens=["<|endoftext|>"]
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
