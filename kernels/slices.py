"""Work on large tensors in pieces, so that temporaries stay small.

A card takes large pieces, because each costs launches; a CPU takes pieces that stay in its cache.
On the meta device only the first two pieces and the last are visited: temporaries of one piece may
live into the next, so two whole ones in a row and the shorter last one show every amount of memory
that occurs, and a rehearsed 7B update takes seconds instead of minutes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lowmem.kernels.dispatch import device_type

BLOCK = 256  # elements that share a scale: pieces hold whole ones

SLICE_ELEMENTS = {"cuda": 2**21, "cpu": 2**18}  # 8 MiB and 1 MiB of float32
_divisors = [1]


@contextmanager
def smaller_slices(divisor: int) -> Iterator[None]:
    """Inside, pieces are so many times smaller: less memory for more launches.

    Element-wise work gives the same bits; sums over pieces are made in another order.
    """
    _divisors.append(divisor)
    try:
        yield
    finally:
        _divisors.pop()


def divided(elements: int) -> int:
    """Elements or rows of a piece, as `smaller_slices` says."""
    return elements // _divisors[-1]


def slice_elements(tensor: Tensor) -> int:
    """Elements of a piece on the tensor's device."""
    return divided(SLICE_ELEMENTS["cpu" if device_type(tensor) == "cpu" else "cuda"])


def flat_slices(tensor: Tensor) -> Iterator[slice]:
    """Slices that cover the flattened tensor."""
    for start, stop in pieces(tensor.numel(), slice_elements(tensor), tensor.is_meta):
        yield slice(start, stop)


def row_slices(
    tensor: Tensor, block: int = BLOCK, elements: int | None = None
) -> Iterator[tuple[int, int]]:
    """(start, stop) of groups of rows along the first dimension.

    start * row length is a multiple of `block`, so that the group is one of whole blocks.
    elements: of a group, if not as many as suit the device; more where one aligned row needs it.
    """
    rows = tensor.shape[0]
    width = max(1, tensor.numel() // max(1, rows))
    aligned = block // math.gcd(width, block)
    most = elements or slice_elements(tensor)
    step = max(1, most // (width * aligned)) * aligned
    return pieces(rows, step, tensor.is_meta)


def pieces(length: int, step: int, on_meta: bool) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of `step` that cover `length`; on meta, those that differ."""
    last = (length - 1) // step * step
    for start in range(0, length, step):
        if on_meta and step < start < last:
            continue
        yield start, min(start + step, length)
