"""Find the input files of a source and read their documents, line by line.

    find_inputs("books/")       books/a.txt (train), books/valid/b.jsonl.gz (validation)
    read_lines(input, "text")   (1, "First text"), (2, Bad("is not JSON")), (3, "Third text")

Whether a bad line ends everything or is counted is the caller's decision.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from lowmem.data.shards import PIECES, Split, is_corpus
from lowmem.errors import DataError, HardwareError, short_path
from lowmem.units import MIB, format_bytes

MAX_LINE_BYTES = 64 * MIB
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
C4_FILES = "en/c4-*.json.gz"
VALIDATION_WORDS = {"validation", "valid", "val", "test"}


@dataclass(frozen=True)
class Input:
    """One file. name: relative to the source, with "/". stamp: tells a changed file apart."""

    name: str
    path: str
    split: Split
    bytes: int
    stamp: str


@dataclass(frozen=True)
class Bad:
    """Why a line cannot be used."""

    why: str


def find_inputs(source: str) -> list[Input]:
    """The files of a path, sorted by name, with their split; DataError when there are none.

    A folder is searched recursively without hidden files, except that of a copy of `allenai/c4`
    only en/ is taken: its other folders hold the same documents again. A file belongs to the
    validation part if one word of its name or of its folders' inside the source says so.
    """
    path = Path(os.path.expanduser(source))  # os.path, because pathlib raises for odd names
    if not os.path.exists(path):
        raise DataError(
            f"{short_path(source)} does not exist",
            'data are "sample", "c4" or a path to text, JSON lines, parquet or prepared shards',
            "the path of a file or folder that exists",
        )
    if os.path.isfile(path):
        found = [path] if path.name.endswith(SUFFIXES) else []
    else:
        found = sorted(path.glob(C4_FILES)) or [p for p in path.rglob("*") if _is_text(p, path)]
    if not found:
        raise DataError(
            f"no text in {source}",
            f"files are taken that end in {', '.join(SUFFIXES)}",
            "give a file or folder with such files; decompress others first",
        )
    root = path.parent if path.is_file() else path
    return sorted((_as_input(p, root) for p in found), key=lambda one: one.name)


def is_c4_copy(source: str) -> bool:
    """Whether `find_inputs` took only en/ of this folder."""
    return any(Path(os.path.expanduser(source)).glob(C4_FILES))


def _as_input(path: Path, root: Path) -> Input:
    name, state = path.relative_to(root).as_posix(), path.stat()
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    by_name: Split = "validation" if words & VALIDATION_WORDS else "train"
    return Input(name, os.path.abspath(path), by_name, state.st_size, str(state.st_mtime_ns))


def _is_text(path: Path, root: Path) -> bool:
    if not path.name.endswith(SUFFIXES) or not path.is_file():
        return False
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    # A corpus of ours inside the source is not text, although its manifest ends in .json.
    return not (is_corpus(path.parent) or (path.parent / PIECES).is_dir())


class Reader:
    """Reads one file and knows how far it is.

    `lines()` yields (number from 1, text or Bad). For plain text a line is a line, with its
    newline; for the other kinds it is a whole document.
    """

    def __init__(self, source: Input, text_key: str) -> None:
        self._source, self._key = source, text_key
        self._raw: BinaryIO | None = None
        self._share = 0.0

    @property
    def is_plain_text(self) -> bool:
        """Whether all lines together are one document."""
        return not self._source.name.removesuffix(".gz").endswith((".json", ".jsonl", ".parquet"))

    def bytes_done(self) -> int:
        """How much of the (packed) file has been read."""
        if self._raw is None or self._raw.closed:
            return int(self._share * self._source.bytes)
        return self._raw.tell()

    def lines(self) -> Generator[tuple[int, str | Bad]]:
        """Number and text of every line that holds any."""
        if self._source.name.endswith(".parquet"):
            yield from self._parquet_rows()
        else:
            with open(self._source.path, "rb") as self._raw:
                for number, line in self._raw_lines(self._raw):
                    text = line if isinstance(line, Bad) else _decoded(line, number)
                    if isinstance(text, str) and not self.is_plain_text:
                        text = _text_of_json(text, self._key)
                    if isinstance(text, Bad) or self.is_plain_text or text.strip():
                        yield number, text
        self._share = 1.0

    def _raw_lines(self, raw: BinaryIO) -> Iterator[tuple[int, bytes | Bad]]:
        packed = self._source.name.endswith(".gz")
        if packed and not self._source.bytes:
            yield 1, Bad("is an empty file, no gzip")
            return
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        number = 0
        try:
            for number, line in enumerate(_limited(file), start=1):
                yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield number + 1, Bad(f"the gzip stream is damaged or cut off ({error})")

    def _parquet_rows(self) -> Generator[tuple[int, str | Bad]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise HardwareError(
                f"{self._source.path} needs the package `pyarrow`", "", "pip install 'lowmem[hub]'"
            ) from error
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self._source.path) as file:
                _check_column(file.schema_arrow, self._key, self._source.path)
                for batch in file.iter_batches(batch_size=1024, columns=[self._key]):
                    # As bytes, so that invalid UTF-8 is found here and not deep inside pyarrow.
                    values = (
                        batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                    )
                    for value in values:
                        number += 1
                        text = _text_of_row(value.as_py(), number)
                        if isinstance(text, Bad) or text.strip():
                            yield number, text
                    self._share = number / file.metadata.num_rows
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # a column's name
            yield number + 1, Bad(f"the parquet file is damaged ({error})")


def _limited(file: BinaryIO | gzip.GzipFile | BufferedReader) -> Iterator[bytes | Bad]:
    """Lines of `file`; of one that is too long, only a Bad."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MIB)
        yield Bad(f"is longer than {format_bytes(MAX_LINE_BYTES)}; put one document on a line")


def _decoded(line: bytes, number: int) -> str | Bad:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
    if b"\0" in line:
        return Bad("holds a NUL byte, so this is no text")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return Bad(f"is not UTF-8 (byte {error.start + 1}: {error.reason})")


def _text_of_json(line: str, key: str) -> str | Bad:
    """The document of a JSON line; "" for a blank line."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "; write one object per line" if line.lstrip()[:1] in "[{" else ""
        return Bad(f"is not JSON ({error}){hint}")
    if not isinstance(row, dict):
        return Bad(f"is a JSON {type(row).__name__}; lowmem reads one object per line")
    if key not in row:
        return Bad(f"has no key {key!r}; its keys: {', '.join(map(str, row)) or 'none'}")
    return checked_text(row[key], key)


def checked_text(text: Any, key: str) -> str | Bad:
    """`text` if it can be a document; `key` is what it is called."""
    if not isinstance(text, str):
        return Bad(f"{key!r} is {type(text).__name__}, not text")
    if "\0" in text:
        return Bad(f"{key!r} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Bad(f"{key!r} holds half of a surrogate pair")
    return text


def _text_of_row(value: bytes | None, number: int) -> str | Bad:
    return Bad("is null, not text") if value is None else _decoded(value, number)


def _check_column(schema: Any, key: str, path: str) -> None:
    import pyarrow.types as kinds

    if key not in schema.names:
        why = f"its columns: {', '.join(schema.names)}"
        raise DataError(f"{path} has no column {key!r}", why, "name it: --text-key COLUMN")
    kind = schema.field(key).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        raise DataError(f"column {key!r} of {path} is {kind}, not text", "", "--text-key COLUMN")
