"""Text in, corpus out: what `lowmem data prepare` and `--data` do.

prepare("books/", tokenizer, Path("books-tokens"))           a folder of one's own
corpus_for(DataConfig(source="books/"), vocab_size=32000)    the same, once, in the cache
"""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.config.schema import DataConfig, Protocol, settled
from lowmem.data.build import build_corpus, build_from_stream, build_key
from lowmem.data.cache import cache_home
from lowmem.data.hub import C4_FIX, C4_MISSING
from lowmem.data.jobs import Options
from lowmem.data.pool import Progress
from lowmem.data.sample import sample_corpus, sample_source, sample_tokenizer
from lowmem.data.shards import Corpus, is_corpus, open_corpus
from lowmem.data.sources import Input, find_inputs, is_c4_copy
from lowmem.data.tokenizer import Tokenizer, load_tokenizer
from lowmem.errors import DataError

PAPER_ROW_TOKENS = 256
C4_DEFAULT_TOKENS = 200_000_000
"""How much of C4 is taken from the hub where nobody says: about 0.8 GB of text."""


def prepare(
    source: str,
    tokenizer: Tokenizer,
    out: Path,
    *,
    text_key: str = "text",
    skip_bad: bool = False,
    workers: int | None = None,
    max_tokens: int | None = None,
    row_tokens: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Corpus:
    """Write the tokens of `source` ("sample", "c4" or a path) to the folder `out`.

    Interrupted, it continues; finished, it only opens. max_tokens bounds the training part, and
    validation to a twentieth of it. row_tokens: documents are cut to so many, for the papers'
    protocol. workers: processes; None chooses.
    """
    options = Options(text_key, skip_bad, max_tokens, row_tokens)
    if source == "c4":
        return build_from_stream(tokenizer, out, _bounded(options), {"kind": "c4"}, progress)
    inputs, about = _described(source)
    return build_corpus(inputs, tokenizer, out, options, about, workers=workers, progress=progress)


def corpus_for(
    config: DataConfig,
    vocab_size: int,
    *,
    progress: Callable[[Progress], None] | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """The corpus that a run with `config` reads, for a model with `vocab_size` ids.

    Prepared shards are opened where they are; anything else is prepared once, into the cache,
    and again when its files, the tokenizer or an option changes.
    """
    folder = Path(os.path.expanduser(config.source))
    if config.source not in ("sample", "c4") and is_corpus(folder):
        corpus = open_corpus(folder)
        _check_tokenizer(corpus, config.tokenizer)
        _check_protocol(corpus, config.protocol, row_tokens_of(config))
    else:
        options = Options(config.text_key, config.skip_bad, max_tokens, row_tokens_of(config))
        tokenizer = tokenizer_for(config)
        _check_end(tokenizer, vocab_size)
        corpus = _cached(config.source, tokenizer, options, progress)
    _check_vocabulary(corpus, vocab_size)
    return corpus


def _cached(
    source: str,
    tokenizer: Tokenizer,
    options: Options,
    progress: Callable[[Progress], None] | None,
) -> Corpus:
    if source == "sample":
        return sample_corpus(tokenizer, options, progress=progress)
    home = cache_home() / "corpora"
    about: dict[str, Any] = {"kind": "c4"}
    if source == "c4":
        options = _bounded(options)
        out = home / f"c4-{build_key([], tokenizer, options, about)}"
        return build_from_stream(tokenizer, out, options, about, progress)
    inputs, about = _described(source)
    out = home / f"{Path(source).resolve().stem}-{build_key(inputs, tokenizer, options, about)}"
    return build_corpus(inputs, tokenizer, out, options, about, progress=progress)


def _described(source: str) -> tuple[Sequence[Input], dict[str, Any]]:
    """The input files of a source other than c4, and what the manifest says about them."""
    if source == "sample":
        return sample_source()
    if is_corpus(Path(os.path.expanduser(source))):
        use = f"use it as it is: lowmem train --data {shlex.quote(source)}"
        raise DataError(f"{source} is prepared already", "", use)
    inputs = find_inputs(source)
    layout = "allenai/c4, only en/" if is_c4_copy(source) else "files"
    return inputs, {"kind": "files", "layout": layout}


def _bounded(options: Options) -> Options:
    return replace(options, max_tokens=options.max_tokens or C4_DEFAULT_TOKENS)


def row_tokens_of(config: DataConfig) -> int | None:
    """Tokens that documents are cut to; None where they are packed."""
    if config.protocol == "lowmem":
        return None
    return PAPER_ROW_TOKENS if config.seq_len == "auto" else settled(config.seq_len)


def tokenizer_for(config: DataConfig) -> Tokenizer:
    """The tokenizer that `config` names; "auto" is the sample's, and t5-base for C4."""
    if config.tokenizer != "auto":
        return load_tokenizer(config.tokenizer)
    if config.source != "c4":
        return sample_tokenizer()
    try:
        return load_tokenizer("t5-base")
    except DataError as error:
        raise DataError(C4_MISSING, f"nor its tokenizer t5-base: {error.why}", C4_FIX) from error


def _check_tokenizer(corpus: Corpus, spec: str) -> None:
    told = corpus.manifest["tokenizer"]
    # A name of the hub, as recipes have it: the shards' own file needs no connection.
    if spec == "auto" or (spec == told["name"] and not os.path.exists(spec)):
        return
    asked = load_tokenizer(spec)
    if told["fingerprint"] != asked.fingerprint:
        raise DataError(
            f"{corpus.folder} was prepared with tokenizer {told['name']}, not with {spec}",
            f"tokenizer.json differs: {told['fingerprint'][:12]}, {asked.fingerprint[:12]}",
            f"leave --tokenizer out, or prepare the text again with --tokenizer {spec}",
        )


def _check_protocol(corpus: Corpus, protocol: Protocol, row_tokens: int | None) -> None:
    """A corpus is packed, or of documents that were cut to a certain length."""
    if corpus.row_tokens == row_tokens:
        return
    if corpus.row_tokens is None:
        why = "it was prepared for packing: documents are whole, in the order of their files"
    else:
        why = f"it was prepared for --protocol galore: documents cut to {corpus.row_tokens} tokens"
    asked = f"--protocol {protocol}" + (f" --seq-len {row_tokens}" if row_tokens else "")
    raise DataError(
        f"{corpus.folder} does not suit {asked}",
        why,
        f"give --data the text itself, or prepare it: lowmem data prepare TEXT {asked} --out NEW",
    )


def _check_end(tokenizer: Tokenizer, vocab_size: int) -> None:
    """What is known before any text is read: the end token occurs in all of it."""
    if tokenizer.end_id >= vocab_size:
        why = f"id {tokenizer.end_id}, {tokenizer.end_token}, ends every document"
        told = tokenizer.name, tokenizer.vocab_size
        raise _too_many_ids(*told, vocab_size, why, tokenizer.vocab_size)


def _check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Ids that do not occur may exceed the model's: T5 has 32,100 and text uses 32,000."""
    largest, told = corpus.manifest["largest_id"], corpus.manifest["tokenizer"]
    if largest >= vocab_size:
        why = f"id {largest} occurs in {corpus.folder}"
        raise _too_many_ids(told["name"], told["vocab_size"], vocab_size, why, largest + 1)


def _too_many_ids(name: str, ids: int, vocab_size: int, why: str, needed: int) -> DataError:
    return DataError(
        f"tokenizer {name} has {ids} ids, the model has {vocab_size}",
        why,
        f"a --model with vocab_size {needed} or more in its config.json, or another --tokenizer",
    )
