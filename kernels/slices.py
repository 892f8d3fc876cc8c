"""Work on large tensors in pieces, so that temporaries stay small.

On the meta device only the first two pieces and the last are visited: temporaries of one piece may
live into the next, so two whole ones in a row and the shorter last one show every amount of memory
that occurs, and a rehearsed 7B update takes seconds instead of minutes.
"""

from collections.abc import Iterator

from torch import Tensor

SLICE_ELEMENTS = 2**22  # 16 MiB of float32; a multiple of every quantisation block


def flat_slices(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the flattened tensor."""
    for start, stop in pieces(tensor.numel(), SLICE_ELEMENTS, tensor.is_meta):
        yield slice(start, stop)


def row_slices(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of groups of rows along the first dimension, at least one row each."""
    rows = tensor.shape[0]
    step = max(1, SLICE_ELEMENTS * rows // max(1, tensor.numel()))
    return pieces(rows, step, tensor.is_meta)


def pieces(length: int, step: int, on_meta: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of `step` that cover `length`; on meta, those that differ."""
    last = (length - 1) // step * step
    for start in range(0, length, step):
        if on_meta and step < start < last:
            continue
        yield start, min(start + step, length)
