"""Slices: they cover everything once, stay small, and begin where quantisation blocks begin."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.kernels import slices
from lowmem.kernels.blockwise import BLOCK
from lowmem.kernels.dispatch import rehearsing
from lowmem.kernels.linear_cross_entropy import SLICE_ROWS
from lowmem.kernels.linear_cross_entropy import row_slices as vocabulary_slices
from lowmem.kernels.slices import flat_slices, row_slices, smaller_slices


def test_a_given_size_of_groups_is_kept_in_whole_blocks() -> None:
    odd = torch.empty(1000, 33)
    assert list(row_slices(odd, 128, 128 * 33 * 3)) == [(0, 384), (384, 768), (768, 1000)]
    assert list(row_slices(odd, 128, 1)) == list(row_slices(odd, 128, 128 * 33))


@given(count=st.integers(0, 200), piece=st.integers(1, 60))
def test_flat_slices_cover_every_element_once(count: int, piece: int) -> None:
    with mock.patch.dict(slices.SLICE_ELEMENTS, cpu=piece, cuda=piece):
        found = list(flat_slices(torch.empty(count)))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % piece == 0 and part.stop - part.start <= piece for part in found)


@given(rows=st.integers(1, 900), width=st.integers(1, 20), piece=st.integers(1, 3000))
def test_row_slices_cover_every_row_once_and_stay_small(rows: int, width: int, piece: int) -> None:
    with mock.patch.dict(slices.SLICE_ELEMENTS, cpu=piece, cuda=piece):
        found = list(row_slices(torch.empty(rows, width)))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    aligned = math.lcm(width, BLOCK)  # the least that is whole rows and whole blocks
    assert all(start * width % BLOCK == 0 for start, _ in found)
    assert all((stop - start) * width <= max(piece, aligned) for start, stop in found)


def test_vectors_are_sliced_too() -> None:
    with mock.patch.dict(slices.SLICE_ELEMENTS, cpu=4):
        assert list(row_slices(torch.empty(600))) == [(0, 256), (256, 512), (512, 600)]


@given(count=st.integers(1, 200), piece=st.integers(1, 60))
def test_meta_visits_the_first_two_pieces_and_the_last(count: int, piece: int) -> None:
    """They show every pair of neighbours that occurs: all between are as large as the first."""
    with mock.patch.dict(slices.SLICE_ELEMENTS, cpu=piece, cuda=piece):
        real = list(flat_slices(torch.empty(count)))
        seen = list(flat_slices(torch.empty(count, device="meta")))
    assert seen == (real[:2] + real[-1:] if len(real) > 2 else real)


def test_meta_is_cut_as_the_device_it_stands_for() -> None:
    meta = torch.empty(2**23, device="meta")
    with rehearsing("cpu"):
        assert next(flat_slices(meta)).stop == slices.SLICE_ELEMENTS["cpu"]
    assert next(flat_slices(meta)).stop == slices.SLICE_ELEMENTS["cuda"]
    assert next(flat_slices(torch.empty(2**23))).stop == slices.SLICE_ELEMENTS["cpu"]


@pytest.mark.parametrize("elements", slices.SLICE_ELEMENTS.values())
def test_the_real_size_is_a_multiple_of_a_quantisation_block(elements: int) -> None:
    assert elements % BLOCK == 0


def test_smaller_slices_are_so_many_times_smaller_and_only_inside() -> None:
    """Of elements and of the vocabulary, and still whole blocks."""

    def longest() -> tuple[int, int]:
        flat = max(piece.stop - piece.start for piece in flat_slices(torch.empty(2**20)))
        return flat, max(stop - start for start, stop in vocabulary_slices(32000))

    before = longest()
    with smaller_slices(4):
        assert longest() == (before[0] // 4, before[1] // 4)
        assert longest()[1] % BLOCK == 0
    assert longest() == before == (slices.SLICE_ELEMENTS["cpu"], SLICE_ROWS)
