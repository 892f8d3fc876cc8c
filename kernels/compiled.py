"""Plain PyTorch that torch.compile turns into few loops, where it is asked to.

    with compiling(True):
        y, rstd = run(normalised, x, weight, eps)    # compiled at its first call
    y, rstd = run(normalised, x, weight, eps)        # the function itself

What is compiled are the element-wise pieces of a block between its products (norms, rotation, gated
unit), not the block: its backward hands weight gradients over one by one, and whoever takes one
may change the weight, so there are calls back into Python between any two products. And
what a compiled graph allocates no rehearsal sees: a piece is small enough that it takes no more
than the function does by itself, which is what plans count.

On meta the function itself runs. A piece that runs out of memory is not repeated by itself, as
other calls are (`train/retried.py`): the update is, or the run ends, to be resumed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config as shapes
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from lowmem.errors import HardwareError
from lowmem.kernels import native

Result = TypeVar("Result")
BACKEND = "inductor"
_VERSIONS = 64  # of one function
_OPTIONS = {"emulate_precision_casts": True}  # round where each operator rounds
_asked = [False]


@contextmanager
def compiling(asked: bool) -> Iterator[None]:
    """Inside, `run` compiles if asked."""
    _asked.append(asked)
    try:
        yield
    finally:
        _asked.pop()


def asked_to_compile() -> bool:
    """Are we inside `compiling(True)`? No kernel runs there in place of what is compiled."""
    return _asked[-1]


def compiles(device: torch.device) -> bool:
    """Is there the compiler that torch.compile needs for this device?"""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return native.compiler() is not None


def run(function: Callable[..., Result], first: Tensor, *rest: Any) -> Result:
    """function(first, *rest), compiled if asked. HardwareError where it does not compile."""
    if not _asked[-1] or first.is_meta:
        return function(first, *rest)
    try:
        # torch.compile refuses to run inside of a dispatch mode.
        with _disable_current_modes():
            result = _compiled(function, BACKEND)(first, *rest)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = str(error).strip().splitlines()
        raise HardwareError(
            f"torch.compile fails for {function.__name__} on {first.device.type}",
            lines[0] if lines else repr(error),
            "train.compile = false runs the same without it",
        ) from error
    # Whoever counts tensors sees what was made: a view has the same memory.
    return tree_map_only(Tensor, Tensor.detach, result)


@cache
def _compiled(function: Callable[..., Result], backend: str) -> Callable[..., Result]:
    # Sides that happen to be equal at the first call stay different symbols: what is compiled, and
    # with it the last bit, must not depend on which shape came first. Only sides of 1 have versions
    # of their own: of a batch, a sequence, a head. For the whole process: a scope costs 0.5 ms.
    shapes.use_duck_shape = False
    torch._dynamo.config.recompile_limit = _VERSIONS
    options: Any = _OPTIONS if backend == "inductor" else None
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend, options=options)
