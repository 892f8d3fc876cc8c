"""`lowmem data`: prepare, describe and verify corpora."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.schema import DataConfig, Protocol
from lowmem.data.pool import Progress
from lowmem.data.prepare import corpus_for, row_tokens_of, tokenizer_for
from lowmem.data.prepare import prepare as prepare_corpus
from lowmem.data.shards import Corpus, open_corpus, verify_corpus
from lowmem.errors import ConfigError, nearest
from lowmem.units import format_bytes, format_count, parse_count

_ANY_VOCABULARY = 2**32  # which model reads the corpus is not known yet


@dataclass(frozen=True)
class Request:
    """The arguments of `data prepare`."""

    source: str
    out: Path | None
    tokenizer: str
    text_key: str
    skip_bad: bool
    workers: int | None
    max_tokens: str | None
    protocol: str
    seq_len: int


def prepare(given: Given, request: Request, *, as_json: bool) -> None:
    """Text to shards in --out, or in the cache where `train --data` finds them."""
    console = Console(quiet=given.quiet)
    with console.work("preparing") as report:

        def progress(done: Progress) -> None:
            report(done.bytes_done, done.bytes, f"{done.tokens:,} tokens")

        corpus = _prepared(request, progress)
    _show(console, corpus, as_json=as_json)


def info(given: Given, folder: Path, *, as_json: bool) -> None:
    """The manifest, for people or programs."""
    _show(Console(quiet=given.quiet), open_corpus(folder), as_json=as_json)


def verify(given: Given, folder: Path) -> None:
    """DataError naming the file whose content has changed."""
    console = Console(quiet=given.quiet)
    verified = verify_corpus(folder)
    console.result(
        f"{folder}: {verified.files} files, {format_bytes(verified.bytes)},"
        " all as the manifest says"
    )


def _prepared(request: Request, progress: Callable[[Progress], None]) -> Corpus:
    if request.protocol not in get_args(Protocol):
        raise ConfigError(
            f"--protocol {request.protocol}",
            f"must be {' or '.join(get_args(Protocol))}",
            nearest(request.protocol, get_args(Protocol)) or "--protocol galore",
        )
    data = DataConfig(
        protocol=cast(Protocol, request.protocol),
        source=request.source,
        tokenizer=request.tokenizer,
        seq_len=request.seq_len,
        text_key=request.text_key,
        skip_bad=request.skip_bad,
    )
    limit = _count(request.max_tokens)
    if request.out is not None:
        return prepare_corpus(
            request.source,
            tokenizer_for(data),
            request.out,
            text_key=request.text_key,
            skip_bad=request.skip_bad,
            workers=request.workers,
            max_tokens=limit,
            row_tokens=row_tokens_of(data),
            progress=progress,
        )
    if request.workers is not None:
        raise ConfigError(
            f"--workers {request.workers} without --out",
            "the cache is prepared with as many processes as fit",
            "--out FOLDER, or leave --workers out",
        )
    return corpus_for(data, _ANY_VOCABULARY, progress=progress, max_tokens=limit)


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        count = parse_count(text)
    except ValueError as error:
        raise ConfigError(f"--max-tokens {text}", str(error), "--max-tokens 200M") from None
    if count < 1:
        raise ConfigError(f"--max-tokens {text}", "must be at least 1", "--max-tokens 200M")
    return count


def _show(console: Console, corpus: Corpus, *, as_json: bool) -> None:
    if as_json:
        record = {"folder": str(corpus.folder), "fingerprint": corpus.fingerprint}
        console.json({**record, **corpus.manifest})
        return
    cut = f"  documents cut to {corpus.row_tokens} tokens" if corpus.row_tokens else ""
    console.result(f"{corpus.folder}  vocabulary {corpus.vocab_size:,}{cut}")
    for name, stream in (("train", corpus.train), ("validation", corpus.validation)):
        if stream is not None:
            console.result(
                f"  {name:10} {stream.tokens:>15,} tokens ({format_count(stream.tokens)})"
                f"  unigram loss {stream.unigram_loss():.4f}"
            )
    if corpus.skipped:
        console.result(f"  {corpus.skipped}")
