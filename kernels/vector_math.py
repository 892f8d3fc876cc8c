"""Make the first vectorised function calls of a CPU process exact.

In the oneMKL that PyTorch 2.9 to 2.13 link, the first call of a function such as exp from several
threads races with the choice of its implementation and may return a low-accuracy result once
(pytorch issue 188792). A resumed run would then differ from the uninterrupted one. One call from a
single thread, on a tensor too small to be split, settles the choice.
"""

from functools import cache

import torch

_FUNCTIONS = ("exp", "log", "sqrt", "sin", "cos", "sigmoid", "rsqrt")


@cache
def settle_vector_math() -> None:
    """Call every function that training uses once, in both float formats; cheap, and done once."""
    for dtype in (torch.float32, torch.float64):
        for name in _FUNCTIONS:
            getattr(torch, name)(torch.ones(64, dtype=dtype))
