"""Turn a few input files into one piece.

A piece is a pure function of its job and is named after everything it depends on, so a prepare
that was interrupted finds the finished ones and does only the others.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.data.pieces import FRAGMENT_CHARACTERS, Piece, PieceWriter
from lowmem.data.shards import SCHEMA_VERSION, Split
from lowmem.data.sources import Bad, Input, Reader
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError


@dataclass(frozen=True)
class Options:
    """How text is read. max_tokens: bound of the training part, None for all of it.

    row_tokens: documents are cut to so many tokens, the end token among them; None: not at all.
    """

    text_key: str = "text"
    skip_bad: bool = False
    max_tokens: int | None = None
    row_tokens: int | None = None

    def told(self) -> dict[str, Any]:
        """What the text that comes out depends on; of packed text as before there was another."""
        return {key: value for key, value in asdict(self).items() if key != "row_tokens" or value}

    def limit(self, split: Split) -> int | None:
        """Tokens after which a split is full: validation gets a twentieth of training."""
        if self.max_tokens is None or split == "train":
            return self.max_tokens
        return max(1, self.max_tokens // 20)


@dataclass(frozen=True)
class Job:
    """Consecutive input files that become one piece. hold_out: validation is cut from training."""

    split: Split
    index: int
    inputs: tuple[Input, ...]
    hold_out: bool


@dataclass(frozen=True)
class PieceMaker:
    """Makes pieces in `folder`; travels to worker processes."""

    folder: Path
    tokenizer: Tokenizer
    options: Options

    def path_of(self, split: Split, index: int, told: Any) -> Path:
        """Where a piece stands that depends on `told` besides tokenizer and options."""
        own = [SCHEMA_VERSION, self.tokenizer.fingerprint, self.tokenizer.end_id]
        text = json.dumps([own, self.options.told(), told])
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{split}-{index:05d}-{key}"

    def find(self, path: Path) -> Piece | None:
        """The finished piece at `path`."""
        try:
            told = json.loads(path.with_suffix(".json").read_text("utf-8"))
            piece = Piece(
                **{**told, "path": str(path), "skipped_first": tuple(told["skipped_first"])}
            )
            width = self.tokenizer.dtype.itemsize
            whole = os.path.getsize(piece.path + ".tokens") == piece.tokens * width
            whole &= os.path.getsize(piece.path + ".documents") == piece.documents * 16
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there or from a crash: it is made again
        return piece if whole else None

    def writer(self, path: Path, hold_out: bool) -> PieceWriter:
        """What writes the piece at `path`."""
        return PieceWriter(path, self.tokenizer, hold_out, self.options.row_tokens)

    def make(self, job: Job, told: Callable[[int, int, int], None]) -> Piece:
        """Read the inputs of `job`. told(bytes, tokens, files): called often, may raise."""
        path = self.path_of(job.split, job.index, asdict(job))
        if (done := self.find(path)) is not None:
            return done
        with self.writer(path, job.hold_out) as writer:
            bytes_before, used = 0, []
            limit = self.options.limit(job.split)
            for number, source in enumerate(job.inputs):
                if limit is not None and writer.kept_tokens >= limit:
                    break
                reader = Reader(source, self.options.text_key)
                for _ in self._read(reader, source, writer, limit):
                    told(bytes_before + reader.bytes_done(), writer.tokens, number)
                bytes_before += source.bytes
                used.append(_described(source))
            return writer.finish(job.split, inputs=tuple(used))

    def _read(
        self, reader: Reader, source: Input, writer: PieceWriter, limit: int | None
    ) -> Iterator[None]:
        """Move one file into `writer`; yields now and then."""
        plain: list[str] = []
        characters = 0
        with closing(reader.lines()) as lines:
            for count, (number, text) in enumerate(lines):
                if limit is not None and writer.kept_tokens >= limit:
                    break
                if isinstance(text, Bad):
                    self.skip(f"{source.path}:{number}: {text.why}", writer)
                elif not reader.is_plain_text:
                    writer.add_document(text)
                else:
                    plain.append(text)
                    characters += len(text)
                    if characters >= FRAGMENT_CHARACTERS:
                        writer.add("".join(plain))
                        plain, characters = [], 0
                if count % 256 == 0:
                    yield
        writer.add("".join(plain))
        writer.end_document()

    def skip(self, message: str, writer: PieceWriter) -> None:
        """Count a bad line, or raise DataError if that was not asked for."""
        if not self.options.skip_bad:
            fix = "repair it, or count and skip such lines: --skip-bad, data.skip_bad = true"
            raise DataError(message, "", fix)
        writer.skipped.append(message)


def _described(source: Input) -> dict[str, Any]:
    with open(source.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": source.name, "split": source.split, "bytes": source.bytes, "sha256": digest}
