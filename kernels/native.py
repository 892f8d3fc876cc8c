"""Compile the C++ of this folder when it is first needed on a CPU, and call its functions.

The library is made in a private temporary folder of this process and removed once it is loaded:
nothing that another program could have written is ever executed. It takes about a second.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).parent / "moments8.cpp"
# No contraction: products and sums are rounded where PyTorch rounds them, so that moments are the
# same bits on a machine without a compiler.
_FLAGS = "-O3 -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -shared -fPIC"
_SECONDS = 120


def compiler() -> str | None:
    """The C++ compiler: $CXX, c++, g++ or clang++; None where there is none."""
    if sys.platform == "win32":  # the flags are those of GCC and Clang
        return None
    candidates = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, once with a warning, where they cannot be made."""
    found = compiler()
    if found is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        made = Path(folder) / "kernels.so"
        command = [found, *_FLAGS.split(), str(SOURCE), "-o", str(made)]
        try:
            # Some compilers lack OpenMP, and are then asked without.
            for extra in (["-fopenmp"], []):
                done = subprocess.run(
                    command + extra, capture_output=True, text=True, timeout=_SECONDS, check=False
                )
                if done.returncode == 0:
                    return ctypes.CDLL(str(made))
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = [str(error)]
    warnings.warn(
        f"{found} makes no kernels for this CPU ({reason[0]}): 8-bit states are updated by plain "
        "PyTorch, a few times slower",
        stacklevel=2,
    )
    return None


def call(name: str, arguments: tuple[Any, ...]) -> None:
    """Run a function over the elements of its first tensor, with as many threads as PyTorch.

    Tensors become pointers, floats double, integers int64; the number of elements and that of
    threads are added.
    """
    import torch  # late: a plan that is kept asks for the compiler without it

    found = library()
    assert found is not None, "asked for only where it is there"
    first: Tensor = next(value for value in arguments if isinstance(value, torch.Tensor))
    getattr(found, name)(
        *map(_plain, arguments), ctypes.c_int64(first.numel()), torch.get_num_threads()
    )


def _plain(value: Any) -> Any:
    match value:
        case bool():
            return ctypes.c_bool(value)
        case int():
            return ctypes.c_int64(value)
        case float():
            return ctypes.c_double(value)
        case _:
            return ctypes.c_void_p(value.data_ptr())
