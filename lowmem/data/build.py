"""From input files (or the stream of C4) to a corpus folder: pieces, then shards.

out/.pieces/ ...            finished pieces of an interrupted build, removed at the end
out/manifest.json           the last file to appear
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem.data.assemble import assemble
from lowmem.data.cache import locked
from lowmem.data.hub import C4Stream
from lowmem.data.jobs import Job, Options, PieceMaker
from lowmem.data.pieces import Piece, PieceWriter
from lowmem.data.pool import Progress, make_pieces
from lowmem.data.shards import PIECES, SCHEMA_VERSION, SPLITS, Corpus, Split, is_corpus, open_corpus
from lowmem.data.shuffle import files_shuffled
from lowmem.data.sources import Bad, Input, checked_text
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import DataError
from lowmem.units import MIB

JOB_BYTES = 4 * MIB
"""Small files are joined to jobs of about this size; a larger file is a job of its own."""

STREAM_PIECE_TOKENS = 2**23

Callback = Callable[[Progress], None]


def build_key(
    inputs: Sequence[Input], tokenizer: Tokenizer, options: Options, about: dict[str, Any]
) -> str:
    """A name for the corpus that follows from all it depends on."""
    own = [SCHEMA_VERSION, tokenizer.fingerprint, tokenizer.end_id, options.told(), about]
    told = json.dumps([own, [asdict(one) for one in inputs]])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def build_corpus(
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    out: Path,
    options: Options,
    about: dict[str, Any],
    *,
    workers: int | None = None,
    progress: Callback | None = None,
) -> Corpus:
    """The corpus of `inputs` in `out`; opened if it is there already, continued if begun."""
    key = build_key(inputs, tokenizer, options, about)
    with _building(out, key) as maker_folder:
        if maker_folder is not None:
            maker = PieceMaker(maker_folder, tokenizer, options)
            jobs = _jobs(inputs, shuffled=options.row_tokens is not None)
            made = make_pieces(jobs, maker, workers, progress)
            pieces = {name: [p for p in made if p.split == name] for name in SPLITS}
            assemble(out, pieces, tokenizer, options, {"key": key} | about)
    return open_corpus(out)


def build_from_stream(
    tokenizer: Tokenizer,
    out: Path,
    options: Options,
    about: dict[str, Any],
    progress: Callback | None,
) -> Corpus:
    """The same from `allenai/c4` on the hub; options.max_tokens must bound it."""
    key = build_key([], tokenizer, options, about)
    with _building(out, key) as maker_folder:
        if maker_folder is not None:
            maker = PieceMaker(maker_folder, tokenizer, options)
            pieces = {name: _stream_pieces(name, maker, progress) for name in SPLITS}
            assemble(out, pieces, tokenizer, options, {"key": key} | about)
    return open_corpus(out)


@contextmanager
def _building(out: Path, key: str) -> Iterator[Path | None]:
    """The folder for pieces, held against other processes; None if `out` is complete already."""
    pieces = out / PIECES
    if not _is_complete(out, key):
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file", "a corpus is a folder", "choose another --out")
        if out.is_dir() and any(out.iterdir()) and not pieces.is_dir():
            why = "it holds files that lowmem did not write"
            raise DataError(f"{out} is not empty", why, "choose an empty or new folder as --out")
        with locked(pieces / "lock"):
            try:
                yield None if _is_complete(out, key) else pieces
            except BrokenPipeError:  # of a progress callback that writes to a closed terminal
                raise
            except OSError as error:
                raise _unreadable(error) from error
    else:
        yield None
    if _is_complete(out, key):
        shutil.rmtree(pieces, ignore_errors=True)


def _is_complete(out: Path, key: str) -> bool:
    """Whether `out` is the corpus called `key`; DataError if it is another one."""
    if not is_corpus(out):
        return False
    found = open_corpus(out).manifest["source"].get("key")
    if found != key:
        raise DataError(
            f"{out} already holds another corpus",
            "its text, tokenizer or options differ from those asked for now",
            f"choose another --out, or remove {out}",
        )
    return True


def _unreadable(error: OSError) -> DataError:
    place = f" ({error.filename})" if error.filename else ""
    fix = "check the file and the free disk space, then run it again: it continues"
    return DataError(f"{error.strerror or error}{place}", "", fix)


def _jobs(inputs: Sequence[Input], *, shuffled: bool) -> list[Job]:
    """shuffled: files in the order of the papers' stream."""
    hold_out = not any(one.split == "validation" for one in inputs)
    jobs: list[Job] = []
    for split in SPLITS:
        own = [one for one in inputs if one.split == split]
        for index, group in enumerate(_groups(files_shuffled(own) if shuffled else own)):
            jobs.append(Job(split, index, tuple(group), hold_out))
    return jobs


def _groups(inputs: Sequence[Input]) -> Iterator[list[Input]]:
    group: list[Input] = []
    held = 0
    for one in inputs:
        if group and held + one.bytes > JOB_BYTES:
            yield group
            group, held = [], 0
        group.append(one)
        held += one.bytes
    if group:
        yield group


def _stream_pieces(split: Split, maker: PieceMaker, progress: Callback | None) -> list[Piece]:
    """Pieces of one split of C4 until its limit; finished ones are found without the network."""
    limit = maker.options.limit(split)
    assert limit is not None
    pieces: list[Piece] = []
    stream: C4Stream | None = None
    while (done := sum(piece.tokens for piece in pieces)) < limit:
        if pieces and pieces[-1].ended:
            break
        path = maker.path_of(split, len(pieces), "allenai/c4")
        piece = maker.find(path)
        if piece is None:
            if stream is None:
                shuffled = maker.options.row_tokens is not None
                position = pieces[-1].position if pieces else None
                stream = C4Stream(split, position, shuffled=shuffled)
            with maker.writer(path, hold_out=False) as writer:
                enough = min(STREAM_PIECE_TOKENS, limit - done)
                ended = _fill(writer, stream, enough, maker, _told(split, done, progress))
                named = {"name": f"allenai/c4 en {split} part {len(pieces)}", "split": split}
                position = stream.position()
                piece = writer.finish(split, inputs=(named,), position=position, ended=ended)
        pieces.append(piece)
    return pieces


def _fill(
    writer: PieceWriter,
    stream: C4Stream,
    enough: int,
    maker: PieceMaker,
    told: Callable[[int], None],
) -> bool:
    """Move documents until `enough` tokens are there; whether the stream has ended."""
    for number, value in enumerate(stream.texts):
        text = checked_text(value, "text")
        if isinstance(text, Bad):
            maker.skip(f"{stream.name}, document {number} of this part: {text.why}", writer)
        else:
            writer.add_document(text)
        if number % 256 == 0:
            told(writer.tokens)
        if writer.tokens >= enough:
            return False
    return True


def _told(split: Split, before: int, progress: Callback | None) -> Callable[[int], None]:
    def told(tokens: int) -> None:
        if progress is not None:
            progress(Progress(f"allenai/c4 {split}", 0, 0, 0, 0, before + tokens))

    return told
