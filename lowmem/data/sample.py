"""The corpus `sample`: the source code of the running Python's standard library.

Real text that is on every machine, with a byte-level BPE tokenizer trained on it. Both depend on
the Python version, so figures compare between machines only with an equal corpus fingerprint.
"""

import hashlib
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from platform import python_version
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lowmem.data.build import build_corpus, build_key
from lowmem.data.cache import cache_home, locked, write_whole
from lowmem.data.jobs import Options
from lowmem.data.pool import Progress
from lowmem.data.shards import Corpus, Split
from lowmem.data.sources import Input
from lowmem.data.tokenizer import Tokenizer, load_tokenizer
from lowmem.errors import DataError
from lowmem.units import MIB

VOCAB_SIZE = 8192
END_TOKEN = "<|endoftext|>"
_LEFT_OUT = {
    "site-packages", "dist-packages", "__pycache__",
    "test", "tests", "idle_test", "idlelib", "lib2to3",
}  # fmt: skip
_TRAINED_ON_BYTES = 16 * MIB
_VALIDATION_EVERY = 20


def sample_files() -> list[tuple[str, Path]]:
    """(name relative to the library, path) of its modules, sorted by name, without test suites."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    named = [(name, path) for name, path in sorted(paths.items()) if _is_taken(name)]
    if not any(_is_validation(name) for name, _ in named):
        raise DataError(
            f"the corpus `sample` needs the standard library's source, {root} has none",
            f"{len(named)} modules were found; this Python was installed without its source",
            "use another Python, or give text: --data PATH",
        )
    return named


@cache
def sample_source() -> tuple[tuple[Input, ...], dict[str, Any]]:
    """The files as input, with a twentieth of them (by hash of the name) as validation."""
    inputs = []
    for name, path in sample_files():
        content = path.read_bytes()
        if not _is_text(content):
            continue
        split: Split = "validation" if _is_validation(name) else "train"
        stamp = hashlib.sha256(content).hexdigest()
        inputs.append(Input(name, str(path), split, len(content), stamp))
    return tuple(inputs), {"kind": "sample", "python": python_version()}


def sample_tokenizer() -> Tokenizer:
    """Byte-level BPE of 8,192 entries, trained once per machine on the training files."""
    inputs, _ = sample_source()
    known = [(one.name, one.stamp) for one in inputs]
    told = repr((tokenizers.__version__, VOCAB_SIZE, END_TOKEN, _TRAINED_ON_BYTES, known))
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    folder = cache_home() / "tokenizers" / f"sample-{key}"
    file = folder / "tokenizer.json"
    if not file.is_file():
        with locked(folder / "lock"):
            if not file.is_file():  # another process may have been faster
                write_whole(file, _trained(inputs).to_str().encode())
    return load_tokenizer(str(folder))


def sample_corpus(
    tokenizer: Tokenizer | None = None,
    options: Options | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> Corpus:
    """The corpus in the cache, prepared if it is not there; None: with its own tokenizer."""
    tokenizer = tokenizer or sample_tokenizer()
    inputs, about = sample_source()
    options = options or Options()
    out = cache_home() / "corpora" / f"sample-{build_key(inputs, tokenizer, options, about)}"
    return build_corpus(inputs, tokenizer, out, options, about, progress=progress)


def _is_taken(name: str) -> bool:
    return not _LEFT_OUT & set(name.split("/"))


def _is_text(content: bytes) -> bool:
    """A module may be in another encoding than UTF-8; such a one is left out."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def _is_validation(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _VALIDATION_EVERY == 0


def _trained(inputs: tuple[Input, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts, size = [], 0
    for one in inputs:
        if one.split == "train" and size < _TRAINED_ON_BYTES:
            texts.append(Path(one.path).read_text("utf-8"))
            size += one.bytes
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
