"""What the data path costs: batches from prepared shards, and preparing, beside Hugging Face.

    python tests/benchmarks/data_path.py C4 --tokenizer T5 [--rounds 5]

CPU time of one process, one thread; rounds interleave what is compared. A slot is a place of a row,
filled or padding, as in `tokenizer(text, truncation=True, padding="max_length", max_length=256)`,
which the papers' trainers call for each document. lowmem's time holds everything from the packed
files to shards on disk: gzip, json, hashes, writing. The peer's is the tokenizer alone. lowmem's
begins every round with no word known.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is loaded

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lowmem.data.batches import Batches, TrainingOrder
from lowmem.data.documents import DocumentBatches
from lowmem.data.prepare import prepare
from lowmem.data.shards import Corpus
from lowmem.data.sources import Bad, Reader, find_inputs
from lowmem.data.tokenizer import load_tokenizer

LENGTH, ROWS = 256, 512
BATCHES = 200  # per round


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def texts_of(source: str) -> list[str]:
    """The documents of the training files."""
    found = []
    for one in find_inputs(source):
        if one.split == "train":
            found += [text for _, text in Reader(one, "text").lines() if not isinstance(text, Bad)]
    return found


def preparing(source: str, tokenizer: str, rounds: int, folder: Path) -> dict[str, Corpus]:
    """Print slots per second of both protocols and of the peer; the corpora."""
    texts = texts_of(source)
    peer = AutoTokenizer.from_pretrained(tokenizer)
    options = {"truncation": True, "padding": "max_length", "max_length": LENGTH}
    spent: dict[str, list[float]] = {"peer": [], "packed": [], "documents": []}
    corpora = {}
    for number in range(rounds):
        spent["peer"].append(seconds(lambda: [peer(text, **options) for text in texts]))
        for name, row_tokens in (("packed", None), ("documents", LENGTH)):
            own, out = load_tokenizer(tokenizer), folder / f"{name}{number}"
            began = time.process_time()
            corpora[name] = prepare(source, own, out, row_tokens=row_tokens, workers=1)
            spent[name].append(time.process_time() - began)
    parts = corpora["packed"].manifest["splits"].values()
    documents = sum(part["documents"] for part in parts)
    slots = {
        "peer": LENGTH * len(texts),
        "packed": sum(part["tokens"] for part in parts),
        "documents": LENGTH * documents,
    }
    print("| | documents/s | slots/s | of the peer |\n|---|---|---|---|")
    for name, times in spent.items():
        second = statistics.median(times)
        each = (len(texts) if name == "peer" else documents) / second
        ratio = slots[name] / second * statistics.median(spent["peer"]) / slots["peer"]
        print(f"| {name} | {each:,.0f} | {slots[name] / second:,.0f} | {ratio:.2f} |")
    return corpora


def batching(corpora: dict[str, Corpus], rounds: int) -> None:
    """Print the time of a batch: its rows, and its micro-batches of 64 rows after that."""
    orders: dict[str, TrainingOrder] = {}
    for name, corpus in corpora.items():
        assert corpus.train is not None
        if name == "packed":
            orders[name] = Batches(corpus.train, seq_len=LENGTH, rows_per_update=ROWS, seed=0)
        else:
            orders[name] = DocumentBatches(corpus.train, seq_len=LENGTH, rows_per_update=ROWS)
    spent: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds * BATCHES):
        for name, order_of in orders.items():
            began = time.process_time_ns()
            batch = order_of.of(number)
            made = time.process_time_ns()
            for _ in batch.micro_batches(64):
                pass
            split = time.process_time_ns()
            spent.setdefault((name, "rows"), []).append(made - began)
            spent.setdefault((name, "micro-batches"), []).append(split - made)
    # The mean, for the windows of several updates are computed with the first of them.
    print(f"\n| {ROWS} x {LENGTH} | | mean ms | median ms |\n|---|---|---|---|")
    for (name, what), times in spent.items():
        mean, median = statistics.mean(times) / 1e6, statistics.median(times) / 1e6
        print(f"| {name} | {what} | {mean:.2f} | {median:.2f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        corpora = preparing(given.source, given.tokenizer, given.rounds, Path(folder))
        batching(corpora, given.rounds)


if __name__ == "__main__":
    main()
