"""Order of training: computed, complete, and independent of everything but seed and update."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.data.batches import Batches, permute, validation_batches
from lowmem.errors import DataError
from tests.data.conftest import MakeStream

SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097]


@pytest.mark.parametrize("count", SIZES)
def test_permutation_is_a_bijection(count: int) -> None:
    for key in (0, 1, 2**62 + 1):
        assert sorted(permute(np.arange(count), count, key)) == list(range(count))


@given(count=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
def test_permutation_of_any_size_is_a_bijection(count: int, key: int) -> None:
    assert len(np.unique(permute(np.arange(count), count, key))) == count


def test_permutation_follows_its_formula_written_slowly() -> None:
    from lowmem.naming import seed_of

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    count, key, half = 40, 9, 3  # 4^3 = 64 is the next power that holds 40
    expected = []
    for place in range(count):
        number = place
        while True:
            left, right = divmod(number, 2**half)
            for turn in range(6):
                left, right = right, left ^ (mix(right ^ seed_of(key, "round", turn)) % 2**half)
            number = left * 2**half + right
            if number < count:
                break
        expected.append(number)
    assert permute(np.arange(count), count, key).tolist() == expected


def test_permutation_works_far_beyond_any_table() -> None:
    count = 10**15
    places = np.array([0, 1, count - 1])
    moved = permute(places, count, 3)
    assert len(set(moved)) == 3
    assert (moved >= 0).all()
    assert (moved < count).all()


def test_permutation_looks_random() -> None:
    count, first = 1000, []
    for key in range(400):
        moved = permute(np.arange(count), count, key)
        first.append(moved[0])
        # Fixed points of a random permutation are Poisson(1): more than 10 has p = 1e-8.
        assert (moved == np.arange(count)).sum() <= 10
        # Neighbours end up as neighbours about twice in 1000.
        assert (np.abs(np.diff(moved)) == 1).sum() <= 15
    # 400 draws in 10 bins: chi-square with 9 degrees of freedom exceeds 40 with p = 1e-5.
    bins = np.bincount(np.array(first) * 10 // count, minlength=10)
    assert ((bins - 40) ** 2 / 40).sum() < 40


def test_every_window_comes_once_per_epoch(make_stream: MakeStream) -> None:
    tokens = list(range(101))  # 25 windows of 4, and the target of the last
    batches = Batches(make_stream(tokens), seq_len=4, rows_per_update=5, seed=3)
    assert batches.windows == 25
    orders = []
    for epoch in range(3):
        rows = torch.cat([batches.of(epoch * 5 + number).rows for number in range(5)])
        assert sorted(rows[:, 0].tolist()) == list(range(0, 100, 4))
        assert (rows - rows[:, :1] == torch.arange(5)).all()
        orders.append(rows[:, 0].tolist())
    assert orders[0] != orders[1] != orders[2]


def test_an_update_may_span_epochs(make_stream: MakeStream) -> None:
    batches = Batches(make_stream(list(range(13))), seq_len=4, rows_per_update=7, seed=0)
    rows = torch.cat([batches.of(number).rows for number in range(3)])[:, 0]
    for epoch in rows.reshape(7, 3):  # 3 windows, 21 rows
        assert sorted(epoch.tolist()) == [0, 4, 8]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_together_see_what_one_rank_sees(make_stream: MakeStream, ranks: int) -> None:
    stream = make_stream(list(range(90)))
    alone = Batches(stream, seq_len=5, rows_per_update=6, seed=1)
    parts = [
        Batches(stream, seq_len=5, rows_per_update=6, seed=1, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for update in range(8):
        together = torch.cat([part.of(update).rows for part in parts])
        assert together.equal(alone.of(update).rows)
        assert all(part.of(update).tokens == 30 for part in parts)


def test_updates_may_be_asked_for_in_any_order(make_stream: MakeStream) -> None:
    stream = make_stream(list(range(200)))
    forward = Batches(stream, seq_len=3, rows_per_update=4, seed=5)
    backward = Batches(stream, seq_len=3, rows_per_update=4, seed=5)
    digests = [forward.of(update).digest() for update in range(40)]
    assert [backward.of(update).digest() for update in reversed(range(40))] == digests[::-1]
    assert len(set(digests)) == 40


def test_another_seed_gives_another_order(make_stream: MakeStream) -> None:
    stream = make_stream(list(range(200)))
    one, other = (Batches(stream, seq_len=3, rows_per_update=8, seed=s).of(0) for s in (0, 1))
    assert not one.rows.equal(other.rows)


def test_the_order_never_changes_between_versions(make_stream: MakeStream) -> None:
    """Recorded with version 0.1.0: another order would end the exact resume of older runs."""
    batches = Batches(make_stream(list(range(100))), seq_len=4, rows_per_update=8, seed=7)
    assert batches.of(5).rows[:, 0].tolist() == [44, 48, 24, 36, 88, 12, 64, 68]


def test_digest_is_the_hash_of_the_tokens(make_stream: MakeStream) -> None:
    batch = Batches(make_stream(list(range(30))), seq_len=4, rows_per_update=2, seed=7).of(1)
    content = b"".join(int(t).to_bytes(8, "little") for t in batch.rows.flatten())
    assert batch.digest() == hashlib.sha256(content).hexdigest()


def test_micro_batches_cover_the_update(make_stream: MakeStream) -> None:
    batch = Batches(make_stream(list(range(90))), seq_len=5, rows_per_update=7, seed=1).of(2)
    parts = list(batch.micro_batches(3))
    assert [len(inputs) for inputs, _ in parts] == [3, 3, 1]
    assert torch.cat([inputs for inputs, _ in parts]).equal(batch.rows[:, :-1])
    assert torch.cat([targets for _, targets in parts]).equal(batch.rows[:, 1:])
    assert all(part.is_contiguous() for pair in parts for part in pair)


def test_a_stream_shorter_than_a_window_is_refused(make_stream: MakeStream) -> None:
    with pytest.raises(DataError, match=r"8 tokens, one sequence needs 9"):
        Batches(make_stream(list(range(8))), seq_len=8, rows_per_update=1, seed=0)


@pytest.mark.parametrize(("rows", "rank", "ranks"), [(3, 0, 2), (0, 0, 1), (4, 2, 2)])
def test_impossible_ranks_are_refused(
    make_stream: MakeStream, rows: int, rank: int, ranks: int
) -> None:
    stream = make_stream(list(range(30)))
    with pytest.raises(ValueError, match="rows for rank"):
        Batches(stream, seq_len=4, rows_per_update=rows, seed=0, rank=rank, ranks=ranks)


@pytest.mark.parametrize("tokens", [2, 5, 6, 37, 41, 50])
@pytest.mark.parametrize("max_tokens", [None, 1, 20, 23])
def test_validation_has_every_target_once(
    make_stream: MakeStream, tokens: int, max_tokens: int | None
) -> None:
    stream = make_stream([100 + number for number in range(tokens)])
    seen = []
    for inputs, targets in validation_batches(stream, seq_len=5, rows=4, max_tokens=max_tokens):
        assert inputs.shape == targets.shape
        assert inputs.shape[0] <= 4
        assert inputs.shape[1] == 5
        real = targets != -100
        assert (targets[real] == inputs[real] + 1).all()
        assert (inputs[~real] == 0).all()
        seen += targets[real].tolist()
    wanted = tokens - 1 if max_tokens is None else min(tokens - 1, max_tokens)
    assert seen == [101 + number for number in range(wanted)]


def test_validation_needs_two_tokens(make_stream: MakeStream) -> None:
    with pytest.raises(DataError, match="has 1 token"):
        list(validation_batches(make_stream([3]), 5, 4, None))
