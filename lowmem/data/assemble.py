"""Join pieces to shards: decide which documents are validation, cut at the limit, count, hash.

What is written depends on the pieces alone. Their order is that of the input files, whoever made
them first.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import lowmem
from lowmem.data.cache import sync_folder, write_whole
from lowmem.data.jobs import Options
from lowmem.data.pieces import Piece, is_held_out
from lowmem.data.shards import FORMAT, MANIFEST, SCHEMA_VERSION, SPLITS, Split, skipped_in_words
from lowmem.data.shuffle import documents_shuffled
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError

SHARD_TOKENS = 2**27
_CHUNK_TOKENS = 2**22
_DOCUMENTS_AT_ONCE = 2**14
_MOST_INPUTS_LISTED = 10_000
HELD_OUT = "held out documents, about 1 in 100 by hash"


def assemble(
    out: Path,
    pieces: dict[Split, list[Piece]],
    tokenizer: Tokenizer,
    options: Options,
    about: dict[str, Any],
) -> None:
    """Write shards, tokenizer and, last, the manifest into `out`.

    pieces: by split; without validation pieces, documents of the training pieces are held out.
    about: goes into the manifest's `source`.
    """
    dtype = tokenizer.dtype
    everything = [piece for name in SPLITS for piece in pieces[name]]
    if not any(piece.documents for piece in everything):
        why = _why_empty(everything)
        raise DataError(f"no text in {_named(everything)}", why, "give files that hold text")
    rows = options.row_tokens is not None
    writers = {
        name: ShardWriter(out, name, dtype, tokenizer.vocab_size, options.limit(name), indexed=rows)
        for name in SPLITS
    }
    cut = (_write_shuffled if rows else _write_packed)(pieces, dtype, writers)
    skipped = {name: sum(piece.skipped for piece in pieces[name]) for name in SPLITS}
    splits = {name: writers[name].close() | {"skipped": skipped[name]} for name in SPLITS}
    tokenizer.save(out)
    largest = max(writers[name].largest_id() for name in SPLITS)
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "lowmem": lowmem.__version__,
        "dtype": dtype.str,
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
        },
        "largest_id": largest,
        "splits": splits,
        "source": about | {"validation": cut} | _described(everything),
    }
    if rows:
        manifest["row_tokens"] = options.row_tokens
    sync_folder(out)
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


class ShardWriter:
    """Writes one split as shards of at most SHARD_TOKENS tokens, each under its name when whole."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype[Any],
        vocab_size: int,
        limit: int | None,
        *,
        indexed: bool = False,
    ) -> None:
        """limit: tokens after which nothing more is taken. indexed: with the start of documents."""
        self._folder, self._split, self._dtype, self.limit = folder, split, dtype, limit
        self._lengths: list[np.ndarray] | None = [] if indexed else None
        self._counts = np.zeros(vocab_size, "<i8")
        self._shards: list[dict[str, Any]] = []
        self._documents = 0
        self._total = 0
        self._inside = 0  # tokens in the open shard
        self._file: Any = None

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents; those after the limit are dropped, the one across it is cut."""
        if self.limit is not None:
            room = self.limit - self._total
            lengths = lengths[np.cumsum(lengths) - lengths < room]
            tokens = tokens[:room]
        self._documents += len(lengths)
        if self._lengths is not None:
            self._lengths.append(lengths)
        while len(tokens):
            if self._file is None:
                self._open()
            part = tokens[: min(_CHUNK_TOKENS, SHARD_TOKENS - self._inside)]
            content = np.asarray(part, self._dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._counts += np.bincount(part, minlength=len(self._counts))
            self._inside += len(part)
            self._total += len(part)
            tokens = tokens[len(part) :]
            if self._inside == SHARD_TOKENS:
                self._seal()

    def close(self) -> dict[str, Any]:
        """Finish the last shard and the counts; the split's entry of the manifest."""
        if self._file is not None:
            self._seal()
        told = {
            "tokens": self._total,
            "documents": self._documents,
            "shards": self._shards,
            **self._table("counts", self._counts),
        }
        if self._lengths is not None:
            told |= self._table("starts", np.concatenate([[0], *self._lengths]).cumsum())
        return told

    def _table(self, kind: str, numbers: np.ndarray) -> dict[str, Any]:
        """Write int64 numbers beside the shards; their two entries of the manifest."""
        content, name = np.asarray(numbers, "<i8").tobytes(), f"{self._split}-{kind}.bin"
        write_whole(self._folder / name, content)
        return {kind: name, f"{kind}_sha256": hashlib.sha256(content).hexdigest()}

    def largest_id(self) -> int:
        """The largest id that occurred, -1 if none did."""
        return int(max(np.flatnonzero(self._counts), default=-1))

    def _open(self) -> None:
        self._name = f"{self._split}-{len(self._shards):05d}.bin"
        self._file = (self._folder / (self._name + ".tmp")).open("wb")
        self._digest = hashlib.sha256()
        self._inside = 0

    def _seal(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        (self._folder / (self._name + ".tmp")).replace(self._folder / self._name)
        told = {"file": self._name, "tokens": self._inside, "sha256": self._digest.hexdigest()}
        self._shards.append(told)
        self._file = None


def _write_shuffled(
    pieces: dict[Split, list[Piece]], dtype: np.dtype[Any], writers: dict[Split, ShardWriter]
) -> str:
    """Write both splits in the order of the papers' stream; how they were cut, for the manifest."""
    if pieces["validation"] or not pieces["train"]:
        for name in SPLITS:
            every = [np.ones(piece.documents, bool) for piece in pieces[name]]
            _write_in_order(pieces[name], every, dtype, writers[name])
        return "files"
    held = _held_out(pieces["train"], dtype)
    _write_in_order(pieces["train"], [~mask for mask in held], dtype, writers["train"])
    _write_in_order(pieces["train"], held, dtype, writers["validation"])
    return HELD_OUT


def _write_in_order(
    pieces: Sequence[Piece], masks: Sequence[np.ndarray], dtype: np.dtype[Any], writer: ShardWriter
) -> None:
    """The chosen documents of the pieces, shuffled; of the plain stream up to the limit."""
    if not pieces:
        return
    texts = [piece.arrays(dtype)[:2] for piece in pieces]
    of_piece = np.concatenate([np.full(len(held), at) for at, (_, held) in enumerate(texts)])
    ends = np.concatenate([held.cumsum() for _, held in texts])
    lengths = np.concatenate([held for _, held in texts])
    documents = np.flatnonzero(np.concatenate(masks))
    if writer.limit is not None:
        documents = documents[lengths[documents].cumsum() <= writer.limit]
    order = documents[documents_shuffled(len(documents))]
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        some = order[start : start + _DOCUMENTS_AT_ONCE]
        parts = [texts[of_piece[one]][0][ends[one] - lengths[one] : ends[one]] for one in some]
        writer.write(np.concatenate(parts), lengths[some])


def _held_out(pieces: Sequence[Piece], dtype: np.dtype[Any]) -> list[np.ndarray]:
    """Which documents of each piece are validation: of several at least one, and never all."""
    masks = [is_held_out(piece.arrays(dtype)[2]) for piece in pieces]
    documents, held = sum(map(len, masks)), sum(int(mask.sum()) for mask in masks)
    if held == documents or (held == 0 and documents > 1):
        _flip_one(pieces, dtype, masks, lowest=held == 0)
    return masks


def _write_packed(
    pieces: dict[Split, list[Piece]], dtype: np.dtype[Any], writers: dict[Split, ShardWriter]
) -> str:
    """Write both splits as they come; how they were cut, for the manifest."""
    if not pieces["validation"] and pieces["train"]:
        return _hold_out(pieces["train"], dtype, writers)
    for name in SPLITS:
        for piece in pieces[name]:
            tokens, lengths, _ = piece.arrays(dtype)
            writers[name].write(tokens, lengths)
    return "files"


def _hold_out(
    pieces: Sequence[Piece], dtype: np.dtype[Any], writers: dict[Split, ShardWriter]
) -> str:
    """Divide the documents of training files; how it was done, for the manifest."""
    if sum(piece.documents for piece in pieces) == 1:
        return _hold_out_tail(pieces, dtype, writers)
    for piece, mask in zip(pieces, _held_out(pieces, dtype), strict=True):
        tokens, lengths, _ = piece.arrays(dtype)
        ends = np.cumsum(lengths)
        for first, last in _runs(mask):
            start = ends[first] - lengths[first]
            writer = writers["validation" if mask[first] else "train"]
            writer.write(tokens[start : ends[last - 1]], lengths[first:last])
    return HELD_OUT


def _flip_one(
    pieces: Sequence[Piece], dtype: np.dtype[Any], masks: list[np.ndarray], lowest: bool
) -> None:
    """Move the document of the lowest hash to validation, or that of the highest to training."""
    hashes = np.concatenate([piece.arrays(dtype)[2] for piece in pieces])
    chosen = int(hashes.argmin() if lowest else hashes.argmax())
    for mask in masks:
        if chosen < len(mask):
            mask[chosen] = lowest
            return
        chosen -= len(mask)


def _hold_out_tail(
    pieces: Sequence[Piece], dtype: np.dtype[Any], writers: dict[Split, ShardWriter]
) -> str:
    (piece,) = (piece for piece in pieces if piece.documents)
    tokens, lengths, _ = piece.arrays(dtype)
    tail = max(1, len(tokens) // 20) if len(tokens) > 1 else 0
    border = len(tokens) - tail
    writers["train"].write(tokens[:border], lengths - tail)
    if tail:
        writers["validation"].write(tokens[border:], np.array([tail]))
    return "the last 5 % of the only document"


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, last) of stretches of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(mask)]
    for first, last in pairwise(borders):
        if last > first:
            yield int(first), int(last)


def _described(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What the tokens came from: one hash over all files, and the files unless they are many."""
    inputs = [one for piece in pieces for one in piece.inputs]
    told: dict[str, Any] = {
        "files": len(inputs),
        "sha256": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        "skipped_first": [line for piece in pieces for line in piece.skipped_first][:5],
    }
    return told | {"inputs": inputs} if len(inputs) <= _MOST_INPUTS_LISTED else told


def _why_empty(pieces: Sequence[Piece]) -> str:
    skipped = sum(piece.skipped for piece in pieces)
    first = [line for piece in pieces for line in piece.skipped_first]
    return skipped_in_words(skipped, first) if skipped else "nothing was found"


def _named(pieces: Sequence[Piece]) -> str:
    names = [one["name"] for piece in pieces for one in piece.inputs]
    return names[0] if len(names) == 1 else f"any of {len(names)} files"
