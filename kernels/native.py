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

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
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
    made = compiled(found)
    if isinstance(made, ctypes.CDLL):
        return made
    warnings.warn(
        f"{found} makes no kernels for this CPU ({made}): plain PyTorch, a few times slower, "
        "updates 8-bit states, rounds and draws instead",
        stacklevel=2,
    )
    return None


def compiled(compiler: str, *options: str) -> ctypes.CDLL | str:
    """The functions; or what the compiler said last where it fails."""
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        made = Path(folder) / "kernels.so"
        command = [compiler, *_FLAGS.split(), *options, *map(str, SOURCES), "-o", str(made)]
        try:
            # Some compilers lack OpenMP, and are then asked without.
            for extra in (["-fopenmp"], []):
                done = subprocess.run(
                    command + extra, capture_output=True, text=True, timeout=_SECONDS, check=False
                )
                if done.returncode == 0:
                    return ctypes.CDLL(str(made))
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)


def call(name: str, arguments: tuple[Any, ...]) -> None:
    """Run a function over the elements of its first tensor, with as many threads as PyTorch.

    Tensors become pointers, floats double, integers int64; the number of elements and that of
    threads are added.
    """
    import torch  # late: a plan that is kept asks for the compiler without it

    found = library()
    assert found is not None, "asked for only where it is there"
    function = getattr(found, name)
    if function.argtypes is None:  # told once, the types need no conversion in Python
        function.argtypes = [*map(_kind, arguments), ctypes.c_int64, ctypes.c_int]
    first: Tensor = next(value for value in arguments if isinstance(value, torch.Tensor))
    plain = (v.data_ptr() if isinstance(v, torch.Tensor) else v for v in arguments)
    function(*plain, first.numel(), torch.get_num_threads())


def _kind(value: Any) -> Any:
    match value:
        case bool():
            return ctypes.c_bool
        case int():
            return ctypes.c_int64
        case float():
            return ctypes.c_double
        case _:
            return ctypes.c_void_p
