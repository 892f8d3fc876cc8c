"""Token shards on disk and their manifest.

A corpus is a folder: `train-00000.bin` ... and `validation-00000.bin` ... hold bare little-endian
ids (uint16 while the vocabulary fits, else uint32), documents one after the other, each closed by
the end token; `*-counts.bin` how often each id occurs (int64); the tokenizer's two files; and
`manifest.json`, which is written last, so that a folder without it is no corpus.

With `row_tokens` in the manifest every document is cut to so many tokens, documents are in the
order of the papers' shuffled stream, and `*-starts.bin` says where each begins (int64, and the end
of the last): the papers' protocol reads one to a row.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from lowmem.data.tokenizer import Tokenizer, load_tokenizer, token_dtype
from lowmem.errors import DataError, plain, short

FORMAT = "lowmem tokens"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PIECES = ".pieces"
"""Folder inside an unfinished corpus; hidden, so that no search for text enters it."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
REBUILD = "remove the folder and prepare the text again (lowmem data prepare, or --data PATH)"


class TokenStream:
    """The tokens of one split as one long sequence; memory-mapped, nothing is loaded."""

    def __init__(
        self, folder: Path, split: dict[str, Any], dtype: np.dtype[Any], largest_id: int = 2**32
    ) -> None:
        """split: the manifest's entry. largest_id: that occurs in the corpus."""
        self.folder, self._largest_id = folder, largest_id
        self.tokens: int = split["tokens"]
        self.documents: int = split["documents"]
        self._counts_file = folder / split["counts"]
        self._starts_file = split.get("starts")
        self._files = [s["file"] for s in split["shards"]]
        files = [np.memmap(folder / s["file"], dtype, "r") for s in split["shards"]]
        self._maps = [np.asarray(file) for file in files]  # mapped all the same, faster to cut
        self._starts = np.cumsum([0] + [s["tokens"] for s in split["shards"]])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as (count,) int64, across the borders of shards.

        DataError: ids that the corpus cannot hold, which would index outside of the embedding.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise ValueError(f"tokens {start} to {start + count} of a stream of {self.tokens}")
        out = np.empty(count, np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            inside = start + done - int(self._starts[shard])
            part = self._maps[shard][inside : inside + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        self._check(out)
        return out

    def read_rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """(rows, count) int64: the same from each of `starts`, all at once."""
        out = np.empty((len(starts), count), np.int64)
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        inside = starts - self._starts[shards]
        whole = starts + count <= self._starts[shards + 1]
        for shard in np.unique(shards[whole]):
            rows = np.flatnonzero(whole & (shards == shard))
            out[rows] = sliding_window_view(self._maps[shard], count)[inside[rows]]
        for row in np.flatnonzero(~whole):  # across a border
            out[row] = self.read(int(starts[row]), count)
        self._check(out)
        return out

    def _check(self, out: np.ndarray) -> None:
        if out.size and int(out.max()) > self._largest_id:
            raise DataError(
                f"a shard of {self.folder} is damaged: it holds id {out.max()}",
                f"{MANIFEST} says that {self._largest_id} is the largest",
                f"lowmem data verify {self.folder} names the file; {REBUILD}",
            )

    def place(self, token: int) -> tuple[str, int]:
        """(file, number of the token in it) of a token of the stream."""
        shard = int(np.searchsorted(self._starts, token, side="right")) - 1
        return self._files[shard], token - int(self._starts[shard])

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins, and the end of the last: (documents + 1,) int64, mapped."""
        if self._starts_file is None:
            raise ValueError(f"{self.folder} has no index of documents")
        return np.asarray(np.memmap(self.folder / self._starts_file, "<i8", "r"))

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each id occurs: (tokenizer's vocab_size,) int64."""
        counts = np.fromfile(self._counts_file, "<i8")
        if counts.min() < 0 or counts.max() > self.tokens or counts.sum() != self.tokens:
            why = f"its counts are not those of {self.tokens} tokens"
            raise DataError(f"{self._counts_file} is damaged", why, REBUILD)
        return counts

    def unigram_loss(self, training: "TokenStream | None" = None) -> float:
        """Loss in nats per token of a model that knows only how frequent each token is.

        The frequencies are this stream's own (its entropy), or those of `training`, with one
        added to each count so that a token it lacks has a finite loss.
        """
        share = self.counts / self.counts.sum()
        known = self.counts if training is None else training.counts + 1
        used = self.counts > 0
        return 0.0 - float((share[used] * np.log(known[used] / known.sum())).sum())


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. fingerprint: equal for equal tokens, wherever the folder stands."""

    folder: Path
    manifest: dict[str, Any]
    train: TokenStream | None
    validation: TokenStream | None
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """The tokenizer's, largest id + 1; `largest_id` in the manifest is what really occurs."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def row_tokens(self) -> int | None:
        """Tokens that documents are cut to, for the papers' protocol; None: they are whole."""
        found: int | None = self.manifest.get("row_tokens")
        return found

    @property
    def skipped(self) -> str:
        """How many unreadable lines were left out of the text, and the first; "" for none."""
        count = sum(split.get("skipped", 0) for split in self.manifest["splits"].values())
        first = self.manifest["source"].get("skipped_first", [])
        return skipped_in_words(count, first) if count else ""

    def tokenizer(self) -> Tokenizer:
        """The copy that the corpus keeps; read once, for every save asks for it."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.folder))


def skipped_in_words(count: int, first: Sequence[str]) -> str:
    """What --skip-bad left out; first: the places of some of it."""
    lines = "1 line was" if count == 1 else f"{count:,} lines were"
    return f"{lines} skipped" + (f", the first: {short(first[0], 300)}" if first else "")


def is_corpus(folder: Path) -> bool:
    """Whether `folder` holds a manifest of ours, be it readable or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):
        return any(folder.glob("*-counts.bin"))
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder; DataError when anything is missing, of wrong size or too new.

    Sizes are checked, contents are not: that is `verify_corpus`.
    """
    manifest = _read_manifest(folder)
    for file, expected in _files(manifest):
        _check_size(folder / file, expected)
    vocab_size = manifest["tokenizer"]["vocab_size"]
    train, validation = (
        TokenStream(folder, split, token_dtype(vocab_size), manifest["largest_id"])
        if (split := manifest["splits"][name])["tokens"]
        else None
        for name in SPLITS
    )
    return Corpus(folder, manifest, train, validation, _fingerprint(manifest))


@dataclass(frozen=True)
class Verified:
    """What `verify_corpus` has read and found right."""

    files: int
    bytes: int


def verify_corpus(folder: Path) -> Verified:
    """Compare the sha256 of every shard and count with the manifest; DataError names the file."""
    corpus = open_corpus(folder)
    hashes: dict[str, str] = {}
    for split in corpus.manifest["splits"].values():
        hashes |= {shard["file"]: shard["sha256"] for shard in split["shards"]}
        hashes[split["counts"]] = split["counts_sha256"]
        if "starts" in split:
            hashes[split["starts"]] = split["starts_sha256"]
    hashes["tokenizer.json"] = corpus.manifest["tokenizer"]["fingerprint"]
    for name, expected in hashes.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            why = f"its sha256 is {found[:12]}..., the manifest says {expected[:12]}..."
            raise DataError(f"{folder / name} is damaged", why, REBUILD)
    return Verified(len(hashes), sum((folder / name).stat().st_size for name in hashes))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        why = "a corpus is a folder that `lowmem data prepare` has finished"
        fix = "give the folder that `lowmem data prepare TEXT --out FOLDER` has made"
        raise DataError(f"no {MANIFEST} in {folder}", why, fix) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}", str(error), REBUILD) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of lowmem's token shards", "", REBUILD)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        why = f"this lowmem reads schema_version {SCHEMA_VERSION}"
        raise DataError(f"{path} has schema_version {short(repr(version))}", why, REBUILD)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "its numbers"
        raise DataError(
            f"{path} lacks or misuses {short(key)!r}", plain(problem["msg"]), REBUILD
        ) from None
    return manifest


def _own_file(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}", name):
        raise ValueError(f"{short(name)!r} is no file of the corpus' own folder")
    return name


_FileName = Annotated[str, AfterValidator(_own_file)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)


class _Shard(_Entry):
    file: _FileName
    tokens: PositiveInt
    sha256: _Sha256


class _SplitEntry(_Entry):
    tokens: NonNegativeInt
    documents: NonNegativeInt
    shards: list[_Shard]
    counts: _FileName
    counts_sha256: _Sha256
    starts: _FileName | None = None
    starts_sha256: _Sha256 | None = None
    skipped: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        if sum(shard.tokens for shard in self.shards) != self.tokens:
            raise ValueError(f"its shards do not hold {self.tokens} tokens together")
        return self


class _TokenizerEntry(_Entry):
    name: str
    fingerprint: _Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    end_id: NonNegativeInt


class _Manifest(_Entry):
    dtype: Literal["<u2", "<u4"]
    tokenizer: _TokenizerEntry
    largest_id: Annotated[int, Field(ge=-1)]
    splits: dict[Split, _SplitEntry]
    source: dict[str, Any]
    row_tokens: Annotated[int, Field(ge=2)] | None = None

    @field_validator("source")
    @classmethod
    def _check_skipped(cls, source: dict[str, Any]) -> dict[str, Any]:
        first = source.get("skipped_first", [])
        if not isinstance(first, list) or not all(isinstance(line, str) for line in first):
            raise ValueError("source.skipped_first must be a list of texts")
        return source

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        if self.splits.keys() != set(SPLITS):
            raise ValueError(f"splits must be {' and '.join(SPLITS)}")
        if self.dtype != token_dtype(self.tokenizer.vocab_size).str:
            raise ValueError(f"dtype {self.dtype} does not suit the vocabulary")
        if self.largest_id >= self.tokenizer.vocab_size:
            raise ValueError(f"largest_id {self.largest_id} is outside of the vocabulary")
        for split in self.splits.values():
            if {split.starts is None, split.starts_sha256 is None} != {self.row_tokens is None}:
                raise ValueError("row_tokens and the starts of documents come together")
        return self


def _files(manifest: dict[str, Any]) -> Iterator[tuple[str, int | None]]:
    """(name, expected bytes) of everything the manifest promises; None: any size."""
    width = token_dtype(manifest["tokenizer"]["vocab_size"]).itemsize
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            yield shard["file"], shard["tokens"] * width
        yield split["counts"], manifest["tokenizer"]["vocab_size"] * 8
        if "starts" in split:
            yield split["starts"], (split["documents"] + 1) * 8
    yield "tokenizer.json", None


def _check_size(path: Path, expected: int | None) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing", f"{MANIFEST} names it", REBUILD)
    found = path.stat().st_size
    if expected is not None and found != expected:
        raise DataError(f"{path} has {found} bytes", f"{MANIFEST} says {expected}", REBUILD)


def _fingerprint(manifest: dict[str, Any]) -> str:
    shards = {
        name: [(shard["tokens"], shard["sha256"]) for shard in split["shards"]]
        for name, split in manifest["splits"].items()
    }
    told = [manifest["dtype"], manifest["tokenizer"]["fingerprint"], shards]
    if "row_tokens" in manifest:
        told.append([split["starts_sha256"] for split in manifest["splits"].values()])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
