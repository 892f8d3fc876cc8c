"""What an example of a kernel is, and the numbers that examples are made of.

changed = example.run(*example.make(2**20, torch.device("cuda")))
difference(example, changed, those_of_the_reference)           # "" where nothing is wrong
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.random_normal import normal

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    """make(elements, device): arguments. run(*arguments): all that is new or has changed.

    bytes: read and written per element, at least. Integers and scales have to be those of the
    reference; tolerance: of other floats, relative to the largest of the reference; neighbours: by
    how many a bfloat16 may lie off besides, for what is rounded twice meets a tie otherwise.
    """

    kernel: Kernel
    make: Callable[[int, torch.device], Tensors]
    run: Callable[..., Tensors]
    bytes: float
    tolerance: float = 0.0
    neighbours: int = 0


def difference(example: Example, found: Tensors, wanted: Tensors) -> str:
    """What differs from the reference by more than it may, for people; "" where nothing does."""
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours.is_floating_point() and example.tolerance and theirs.numel():
            exact = theirs.float()
            allowed = exact.abs().amax().mul(example.tolerance)
            if ours.dtype == torch.bfloat16:
                allowed = allowed + exact.abs() * (example.neighbours * 2**-7)
            wrong = (ours.float() - exact).abs().le(allowed).logical_not_()
        else:
            wrong = ours.ne(theirs)
        count = int(wrong.sum())
        if count:
            return f"{count} of {wrong.numel()} numbers of result {place} differ"
    return ""


def numbers(elements: int, seed: int, device: torch.device) -> Tensor:
    """Normal numbers over five decades, the same on every device."""
    even = elements + elements % 2
    spread = torch.arange(elements, device=device).remainder(5).neg().float()
    return normal(even, seed, device=device)[:elements] * 10.0**spread


def matrix(elements: int, seed: int, device: torch.device) -> Tensor:
    """About so many of these numbers, as a matrix that is not square."""
    width = max(1, min(4096, math.isqrt(4 * elements)))
    rows = max(1, elements // width)
    return numbers(rows * width, seed, device).view(rows, width)


_WIDTH = 512


def token_rows(elements: int, device: torch.device, count: int) -> Tensors:
    """So many bfloat16 matrices of up to _WIDTH columns: what the operators of a block take."""
    width = min(elements, _WIDTH)
    whole = elements // width * width
    return tuple(numbers(whole, seed, device).view(-1, width).bfloat16() for seed in range(count))
