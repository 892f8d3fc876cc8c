"""Element-wise work on large tensors in pieces, so that float32 temporaries stay small."""

from collections.abc import Iterator

from torch import Tensor

SLICE_ELEMENTS = 2**20  # 4 MiB of float32; a multiple of every block


def flat_slices(elements: int) -> Iterator[slice]:
    """Slices that cover `elements` consecutive elements."""
    for start in range(0, elements, SLICE_ELEMENTS):
        yield slice(start, min(start + SLICE_ELEMENTS, elements))


def row_slices(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of groups of rows along the first dimension, at least one row each."""
    rows = tensor.shape[0]
    step = max(1, SLICE_ELEMENTS * rows // max(1, tensor.numel()))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
