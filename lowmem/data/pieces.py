"""A piece: the tokens of some whole documents on disk, with the length and hash of each.

Which documents are validation is decided later (`assemble.py`), from the hashes.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.cache import write_whole
from lowmem.data.shards import Split
from lowmem.data.tokenizer import Tokenizer
from lowmem.units import MIB

FRAGMENT_CHARACTERS = MIB
"""A longer document is encoded in parts of about this length, cut at a line or a word."""

_BUFFERED_CHARACTERS = 4 * MIB
_BUFFERED_FRAGMENTS = 8192
_HELD_OUT_EVERY = 100


@dataclass(frozen=True)
class Piece:
    """A finished piece. kept_tokens: without the documents that will be held out."""

    path: str
    split: Split
    tokens: int
    kept_tokens: int
    documents: int
    skipped: int = 0
    skipped_first: tuple[str, ...] = ()
    inputs: tuple[dict[str, Any], ...] = ()
    position: dict[str, Any] | None = None  # of a stream, after this piece
    ended: bool = False  # the stream has nothing more

    def arrays(self, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (memory-mapped), lengths of the documents and their hashes (uint64)."""
        tokens = np.memmap(self.path + ".tokens", dtype, "r") if self.tokens else np.empty(0, dtype)
        table = np.fromfile(self.path + ".documents", "<u8").reshape(-1, 2)
        return tokens, table[:, 0].astype(np.int64), table[:, 1]


def is_held_out(hashes: np.ndarray) -> np.ndarray:
    """Which documents are validation where no file is: about 1 in 100, by their text alone."""
    return hashes % np.uint64(_HELD_OUT_EVERY) == 0


@dataclass
class PieceWriter:
    """Encodes text in large batches and appends the tokens to a file.

    row_tokens: a document is cut to so many tokens, the end token among them; None: never.
    """

    path: Path
    tokenizer: Tokenizer
    hold_out: bool
    row_tokens: int | None = None
    tokens: int = 0
    kept_tokens: int = 0
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._width = self.tokenizer.dtype.itemsize
        self._end = np.array(self.tokenizer.end_id, self.tokenizer.dtype).tobytes()
        self._texts: list[str] = []
        self._last: list[bool] = []  # whether a text ends its document
        self._buffered = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._is_open = False  # a document has begun
        self._hashes: list[int] = []
        self._lengths: list[int] = []
        self._length = 0  # of the document that is being encoded

    def __enter__(self) -> "PieceWriter":
        self._temporary = self.path.with_suffix(".tokens.tmp")
        self._file = self._temporary.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add_document(self, text: str) -> None:
        """A whole document."""
        for part in _fragments(text):
            self.add(part)
        self.end_document()

    def add(self, text: str) -> None:
        """The next part of a document; blank parts are left out."""
        if not text.strip():
            return
        if self._buffered >= _BUFFERED_CHARACTERS or len(self._texts) >= _BUFFERED_FRAGMENTS:
            self._flush()
        self._digest.update(text.encode())
        if self._is_open and self.row_tokens is not None:
            return  # its first part alone has more tokens than are kept
        self._texts.append(text)
        self._last.append(False)
        self._buffered += len(text)
        self._is_open = True

    def end_document(self) -> None:
        """Close the document, unless it was empty."""
        if self._is_open:
            self._last[-1] = True
            self._hashes.append(int.from_bytes(self._digest.digest(), "little"))
            self._digest = hashlib.blake2b(digest_size=8)
            self._is_open = False

    def finish(self, split: Split, **told: Any) -> Piece:
        """Write what is left; the small json file comes last and says that the piece is whole."""
        self._flush()
        _sync(self._file)
        table = np.array([self._lengths, self._hashes], "<u8").T
        with self.path.with_suffix(".documents").open("wb") as file:
            file.write(table.tobytes())
            _sync(file)
        self._temporary.replace(self.path.with_suffix(".tokens"))
        piece = Piece(
            path=str(self.path),
            split=split,
            tokens=self.tokens,
            kept_tokens=self.kept_tokens,
            documents=len(self._lengths),
            skipped=len(self.skipped),
            skipped_first=tuple(self.skipped[:5]),
            **told,
        )
        write_whole(self.path.with_suffix(".json"), json.dumps(asdict(piece)).encode())
        return piece

    def _flush(self) -> None:
        most = None if self.row_tokens is None else self.row_tokens - 1
        for encoded, last in zip(self.tokenizer.encode(self._texts, most), self._last, strict=True):
            ids = encoded + (self._end if last else b"")
            self._file.write(ids)
            self._length += len(ids) // self._width
            self.tokens += len(ids) // self._width
            if last:
                self._close_encoded()
        self._texts, self._last, self._buffered = [], [], 0

    def _close_encoded(self) -> None:
        held = self.hold_out and self._hashes[len(self._lengths)] % _HELD_OUT_EVERY == 0
        self.kept_tokens += 0 if held else self._length
        self._lengths.append(self._length)
        self._length = 0


def _fragments(text: str) -> Iterator[str]:
    """`text` in parts that join to it, cut after a newline or before a space if there is one."""
    start = 0
    while len(text) - start > FRAGMENT_CHARACTERS:
        end = start + FRAGMENT_CHARACTERS
        cut = text.rfind("\n", start, end) + 1
        cut = cut if cut > start else text.rfind(" ", start + 1, end)
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
