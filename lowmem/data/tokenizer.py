"""Load a tokenizer and turn text into ids, in the one way that training data needs.

Text is only text: a document that quotes `</s>` or `<extra_id_5>` never yields the special id, no
special token is added, and nothing is cut although the file may ask for truncation.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lowmem.data.hub import hub_file
from lowmem.data.words import WordEncoder, cuts_at_spaces
from lowmem.errors import DataError, short_path

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
"""Names of the end token, for files that do not say which one it is."""

_LARGEST_VOCABULARY = 2**24


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type on disk that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Tokenizer:
    """An unchanging tokenizer.

    name: how a manifest calls it. vocab_size: largest id in the file + 1. end_id: ends a document.
    dtype: of an id on disk. fingerprint: sha256 of tokenizer.json.
    """

    def __init__(self, text: str, config: dict[str, Any], name: str) -> None:
        """text: of tokenizer.json. config: of tokenizer_config.json, or empty."""
        self.name = name
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._text = text
        self._config = config
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._encoder = tokenizers.Tokenizer.from_str(_hide_special_pieces(text))
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise DataError(
                f"tokenizer {name} has an id {self.vocab_size - 1:,}",
                f"counts are kept for every id, up to {_LARGEST_VOCABULARY:,}",
                "give --tokenizer an undamaged tokenizer.json",
            )
        self.dtype = token_dtype(self.vocab_size)
        by_word = cuts_at_spaces(self._encoder)
        self._words = WordEncoder(self._whole, self.dtype.itemsize) if by_word else None
        self.end_token = _end_token(self._tokenizer, config, name)
        self.end_id = self._tokenizer.get_vocab(with_added_tokens=True)[self.end_token]

    def __reduce__(self) -> tuple[Any, ...]:
        # `tokenizers` forgets encode_special_tokens when pickled, so workers build it anew.
        return Tokenizer, (self._text, self._config, self.name)

    def encode(self, texts: Sequence[str], most: int | None = None) -> list[bytes]:
        """The ids of each text, the first `most` of them, without special tokens, as `dtype`."""
        found = self._whole(texts) if self._words is None else self._words.encode(texts, most)
        return found if most is None else [ids[: most * self.dtype.itemsize] for ids in found]

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        encoded = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        lists = [one.ids for one in encoded]
        ids = np.fromiter(chain.from_iterable(lists), self.dtype).tobytes()
        ends = accumulate((len(one) * self.dtype.itemsize for one in lists), initial=0)
        return [ids[start:end] for start, end in pairwise(ends)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self._tokenizer.decode(ids)

    def save(self, folder: Path) -> None:
        """Write the files of `files` into a folder, which is made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """The two files that `transformers.AutoTokenizer.from_pretrained` needs, by name."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_token}
        config |= self._config
        return {
            # Bytes, not text: the fingerprint of the copy must be this one.
            "tokenizer.json": self._text.encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        }


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of a folder, of a tokenizer.json, or of a model on the Hugging Face hub."""
    path = Path(os.path.expanduser(spec))  # os.path, because pathlib raises for odd names
    if os.path.isdir(path):
        path /= "tokenizer.json"
        if not os.path.isfile(path):
            raise DataError(
                f"no tokenizer.json in {spec}",
                "lowmem reads the format of the `tokenizers` library",
                "convert: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
            )
    if os.path.isfile(path):
        return _read(path, path.with_name("tokenizer_config.json"), _name(path))
    if path.is_absolute() or spec.startswith((".", "~")) or path.suffix in (".json", ".model"):
        raise DataError(f"tokenizer {short_path(spec)} does not exist", "", "check --tokenizer")
    return _from_hub(spec)


def _from_hub(name: str) -> Tokenizer:
    what = f"tokenizer {name!r} is no file or folder here"
    fix = "give --tokenizer a folder or a tokenizer.json, or leave it out"
    path = hub_file(name, "tokenizer.json", what, fix)
    try:
        config = hub_file(name, "tokenizer_config.json", what, fix)
    except DataError:  # an optional file: without it the end token is found by its usual names
        config = path.with_name("tokenizer_config.json")
    return _read(path, config, name)


def _name(path: Path) -> str:
    """The folder's name says more than "tokenizer"; a file with a name of its own keeps it."""
    return path.resolve().parent.name if path.name == "tokenizer.json" else path.name


def _read(path: Path, config_path: Path, name: str) -> Tokenizer:
    try:
        config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
        return Tokenizer(path.read_bytes().decode(), config, name)
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `tokenizers` raises bare Exception, and PyO3's panics are none
        raise DataError(
            f"cannot read the tokenizer {path}",
            f"{type(error).__name__}: {error}",
            "give --tokenizer a tokenizer.json of the `tokenizers` library, or its folder",
        ) from error


def _end_token(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> str:
    named = config.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    for token in [named] if named else END_TOKENS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"tokenizer {name} has no end-of-document token" + (f" {named!r}" if named else ""),
        f"documents are separated by one; known names: {', '.join(END_TOKENS)}",
        'name it in tokenizer_config.json beside tokenizer.json: {"eos_token": "..."}',
    )


def _hide_special_pieces(text: str) -> str:
    """`text` of tokenizer.json with special tokens renamed where text could spell them.

    A Unigram model (T5) looks up every piece of its vocabulary, special or not. The new names
    begin with NUL, which no document may hold; ids stay.
    """
    content = json.loads(text)
    if content["model"].get("type") != "Unigram":
        return text
    special = [token for token in content["added_tokens"] if token["special"]]
    names = {token["content"] for token in special}
    for token in special:
        token["content"] = "\0" + token["content"]
    for piece in content["model"]["vocab"]:
        if piece[0] in names:
            piece[0] = "\0" + piece[0]
    content["post_processor"] = None  # it only adds special tokens, by their old names
    return json.dumps(content)
