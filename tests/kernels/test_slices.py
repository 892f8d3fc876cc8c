"""Slices: they cover everything once, stay small, and begin where quantisation blocks begin."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.kernels import slices
from lowmem.kernels.blockwise import BLOCK
from lowmem.kernels.slices import flat_slices, row_slices


@given(count=st.integers(0, 200), piece=st.integers(1, 60))
def test_flat_slices_cover_every_element_once(count: int, piece: int) -> None:
    with mock.patch.object(slices, "SLICE_ELEMENTS", piece):
        found = list(flat_slices(torch.empty(count)))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % piece == 0 and part.stop - part.start <= piece for part in found)


@given(rows=st.integers(1, 60), width=st.integers(1, 20), piece=st.integers(1, 100))
def test_row_slices_cover_every_row_once_and_stay_small(rows: int, width: int, piece: int) -> None:
    with mock.patch.object(slices, "SLICE_ELEMENTS", piece):
        found = list(row_slices(torch.empty(rows, width)))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    assert all((stop - start) * width <= max(piece, width) for start, stop in found)


def test_vectors_are_sliced_too() -> None:
    with mock.patch.object(slices, "SLICE_ELEMENTS", 4):
        assert list(row_slices(torch.empty(10))) == [(0, 4), (4, 8), (8, 10)]


@given(count=st.integers(1, 200), piece=st.integers(1, 60))
def test_meta_visits_the_first_two_pieces_and_the_last(count: int, piece: int) -> None:
    """They show every pair of neighbours that occurs: all between are as large as the first."""
    with mock.patch.object(slices, "SLICE_ELEMENTS", piece):
        real = list(flat_slices(torch.empty(count)))
        seen = list(flat_slices(torch.empty(count, device="meta")))
        rows = list(row_slices(torch.empty(count, device="meta")))
    assert seen == (real[:2] + real[-1:] if len(real) > 2 else real)
    assert rows == [(part.start, part.stop) for part in seen]


@pytest.mark.parametrize("elements", [slices.SLICE_ELEMENTS])
def test_the_real_size_is_a_multiple_of_a_quantisation_block(elements: int) -> None:
    assert elements % BLOCK == 0
