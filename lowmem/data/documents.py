"""The papers' protocol: one document per row, cut or padded to the same length.

    a corpus with `row_tokens` 256 holds    [the, rank, </s>], [of, a, ..., </s>], ...   already cut
    DocumentBatches: rows 0..511 are update 0, rows 512..1023 update 1, ...; then from the beginning

Attention is causal and padding stands on the right, so nothing before it sees it: columns in which
no row of a micro-batch has a token are left out, with the same loss.

Source: section 5 of GaLore, arXiv:2403.03507, and its released trainer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lowmem.data.batches import UpdateBatch
from lowmem.data.shards import TokenStream
from lowmem.errors import DataError


class DocumentBatches:
    """The order of training: update index -> rows, one document each."""

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        rows_per_update: int,
        by_length: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """by_length: documents of like length share a micro-batch, which leaves out more padding.

        rows_per_update: over all ranks, a multiple of `ranks`; each takes consecutive rows.
        """
        if rows_per_update < 1 or rows_per_update % ranks or not 0 <= rank < ranks:
            raise ValueError(f"{rows_per_update} rows for rank {rank} of {ranks}")
        self._stream, self._seq_len, self._by_length = stream, seq_len, by_length
        self._rows_per_update = rows_per_update
        share = rows_per_update // ranks
        self._own = slice(rank * share, (rank + 1) * share)

    def of(self, update: int) -> UpdateBatch:
        """The rows of update `update` (from 0)."""
        documents = self._documents_of(update)
        lengths = self._stream.starts[documents + 1] - self._stream.starts[documents]
        targets = int((lengths - 1).sum())
        if not targets:
            raise DataError(
                f"the {len(documents)} documents of update {update + 1} hold one token each",
                "the first token of a document has nothing before it to be predicted from",
                "a larger --batch, or text with longer documents",
            )
        return padded(self._stream, documents[self._own], self._seq_len, targets, self._by_length)

    def places_of(self, update: int) -> list[tuple[str, int]]:
        """(shard, first token in it) of every row of update `update`."""
        own = self._documents_of(update)[self._own]
        return [self._stream.place(int(self._stream.starts[document])) for document in own]

    def _documents_of(self, update: int) -> np.ndarray:
        first = update * self._rows_per_update
        return np.arange(first, first + self._rows_per_update) % self._stream.documents


def padded(
    stream: TokenStream, documents: np.ndarray, seq_len: int, tokens: int, by_length: bool
) -> UpdateBatch:
    """These documents as rows; tokens: targets of the update. DataError: a damaged index."""
    starts, stops = stream.starts[documents], stream.starts[documents + 1]
    lengths = stops - starts
    for place in np.flatnonzero((lengths <= 0) | (lengths > seq_len)):
        length = lengths[place]
        raise DataError(
            f"the index of documents in {stream.folder} is damaged",
            f"document {documents[place]} has {length} tokens, at most {seq_len} are possible",
            f"lowmem data verify {stream.folder} names the file; prepare the text again",
        )
    breaks = np.flatnonzero(np.diff(documents) != 1) + 1  # where the text begins again
    runs = zip([0, *breaks], [*breaks, len(documents)], strict=True)
    text = [stream.read(int(starts[a]), int(stops[b - 1] - starts[a])) for a, b in runs]
    rows = np.zeros((len(documents), seq_len + 1), np.int64)
    filled = text[0] if len(text) == 1 else np.concatenate(text)
    rows[np.arange(seq_len + 1) < lengths[:, None]] = filled
    return UpdateBatch(torch.from_numpy(rows), tokens, torch.from_numpy(lengths), by_length)


@dataclass(frozen=True)
class EvaluationBatch:
    """Rows whose mean loss counts once. tokens: of them that are no padding, the first included."""

    rows: UpdateBatch
    tokens: int


def evaluation_steps(
    stream: TokenStream, seq_len: int, batch: int, gpus: int, tokens: int | None
) -> Iterator[list[EvaluationBatch]]:
    """The papers' evaluation: steps of one batch for each GPU, until more than `tokens` are seen.

    batch: documents on a GPU. Documents come in their order; the papers deal them out to GPUs.
    """
    seen = 0
    for first in range(0, stream.documents, batch * gpus):
        if tokens is not None and seen > tokens:
            return
        step = []
        for start in range(first, min(first + batch * gpus, stream.documents), batch):
            documents = np.arange(start, min(start + batch, stream.documents))
            lengths = stream.starts[documents + 1] - stream.starts[documents]
            targets = int((lengths - 1).sum())
            if targets:
                rows = padded(stream, documents, seq_len, targets, by_length=True)
                step.append(EvaluationBatch(rows, int(lengths.sum())))
        seen += sum(one.tokens for one in step)
        if step:
            yield step
