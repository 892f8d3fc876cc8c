"""Standard normal numbers as a function of (seed, index): the same on every device, stored nowhere.

Each 32-bit hash gives two 16-bit numbers, and a table of 65536 quantiles turns them into normals.
No device computes a logarithm, so not even the last bit differs between two of them; the largest
magnitude is 4.3.
"""

from functools import cache

import torch
from torch import Tensor

from lowmem.kernels.dispatch import Kernel
from lowmem.kernels.rounding import hashed_bits, seed_words, signed

NORMAL = Kernel(
    "random_normal(Tensor(a!) out, Tensor table, int low, int high, int pair) -> ()",
    triton="random_normal_triton",
    native=True,
)

_LEVELS = 2**16


@cache
def _quantiles(device: str) -> Tensor:
    """Normal quantiles of the middles of 65536 equal cells, scaled to variance 1."""
    middles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    values = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).float().to(device)


def lookup_table(device: str) -> Tensor:
    """The constant that this module keeps on a device once it has been used there."""
    return _quantiles(device)


def normal(count: int, seed: int, offset: int = 0, *, device: torch.device | str) -> Tensor:
    """(count,) float32 numbers of N(0, 1), for the indices offset, offset + 1, ...

    offset must be even.
    """
    device, table = torch.device(device), _quantiles(str(device))
    out = torch.empty(0, device=device)
    if NORMAL.runs_on(out):
        out = torch.empty(count, device=device)
        NORMAL(out, table, *seed_words(seed), signed(offset // 2))
        return out
    pairs = hashed_bits(-(-count // 2), seed, offset // 2, device)
    # Read as 16-bit halves, low one first on every machine that torch supports.
    halves = pairs.view(torch.int16).to(torch.int32).bitwise_and_(_LEVELS - 1)
    return table.index_select(0, halves[:count])
