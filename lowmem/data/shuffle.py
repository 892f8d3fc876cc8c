"""The order of the papers' stream: files in a random order, documents through a shuffle buffer.

    files_shuffled(["a", "b", "c"])   the order in which `datasets` opens them for that seed
    documents_shuffled(5)             array([2, 0, ...]): which document comes first, second, ...

Source: `IterableDataset.shuffle(seed=42)` of the package `datasets`, with which the published runs
were made: version 2, whose buffer gives one document for each that it takes. Version 5 empties
half a buffer at a time; the order of files is the same.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

SEED = 42
BUFFER = 1000  # documents
_DRAWN = 1000  # numbers at a time, which decides the numbers

T = TypeVar("T")


def files_shuffled(names: Sequence[T], seed: int = SEED) -> list[T]:
    """`names`, given in the order of the dataset, in that of the shuffled stream."""
    places = list(range(len(names)))
    np.random.default_rng(seed).shuffle(places)
    return [names[place] for place in places]


def documents_shuffled(count: int, seed: int = SEED, buffer: int = BUFFER) -> np.ndarray:
    """(count,) int64: for each place of the shuffled stream, which document of the plain one.

    What comes at a place depends on documents up to `buffer` later alone, so a stream that is
    longer begins with the same order.
    """
    random = np.random.default_rng(seed)
    held = list(range(min(buffer, count)))
    order = np.empty(count, np.int64)
    drawn = _places(random, buffer)
    for taken in range(len(held), count):
        place = next(drawn)
        order[taken - buffer] = held[place]
        held[place] = taken
    random.shuffle(held)
    order[count - len(held) :] = held
    return order


def _places(random: np.random.Generator, buffer: int) -> Iterator[int]:
    while True:
        yield from random.integers(0, buffer, size=_DRAWN).tolist()
