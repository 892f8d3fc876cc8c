"""The order of the papers' stream, against `datasets` and against a buffer of documents."""

import inspect
from typing import Any

import numpy as np
import pytest

from lowmem.data.shuffle import documents_shuffled, files_shuffled


@pytest.mark.parametrize("count", [1, 8, 100])
def test_files_are_opened_as_datasets_opens_them(count: int) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(
        num_shards=count
    )
    plain: dict[str, Any] = {"seed": 42, "buffer_size": 1}
    if "max_buffer_input_shards" in inspect.signature(rows.shuffle).parameters:
        plain["max_buffer_input_shards"] = 1  # later versions read several files in turns
    theirs = [row["n"] for row in rows.shuffle(**plain)]
    assert files_shuffled(range(count)) == theirs


@pytest.mark.parametrize(("count", "buffer"), [(0, 3), (2, 3), (3, 3), (50, 7), (5000, 1000)])
def test_documents_leave_the_buffer_for_the_one_that_comes(count: int, buffer: int) -> None:
    random, held, out = np.random.default_rng(42), list[int](), list[int]()
    places: list[int] = []
    for document in range(count):
        if len(held) == buffer:
            places = places or list(random.integers(0, buffer, size=1000))
            place = places.pop(0)
            out.append(held[place])
            held[place] = document
        else:
            held.append(document)
    random.shuffle(held)
    assert documents_shuffled(count, buffer=buffer).tolist() == [*out, *held]


def test_a_longer_stream_begins_with_the_same_order() -> None:
    short, longer = documents_shuffled(3000), documents_shuffled(9000)
    assert (short[:2000] == longer[:2000]).all()
    assert sorted(longer) == list(range(9000))
