"""Every kernel is tested where it can run: compiled C++, Triton interpreted, Triton on a card."""

import ctypes
import importlib.util
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from lowmem.kernels import native
from lowmem.kernels.dispatch import forced

_CARD = torch.cuda.is_available()
_TRITON = importlib.util.find_spec("triton") is not None
_WHY_NOT = "a card compiles what is interpreted elsewhere" if _CARD else ""
_WHY_NOT = _WHY_NOT if _TRITON else "Triton is not installed"


@pytest.fixture(
    params=[
        pytest.param("interpreter", marks=pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not _CARD, reason="needs a CUDA device")],
        ),
    ]
)
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Inside, Triton kernels run: on a card, else interpreted."""
    device = "cuda" if request.param == "cuda" else "cpu"
    with forced("triton"):
        yield torch.device(device)


@cache
def portable() -> ctypes.CDLL | None:
    """The C++ without instructions that only some CPUs have."""
    compiler = native.compiler()
    made = None if compiler is None else native.compiled(compiler, "-DLOWMEM_PORTABLE")
    assert not isinstance(made, str), made
    return made


@pytest.fixture(params=["for this CPU", "portable"])
def native_kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Inside, the compiled C++ runs."""
    if native.library() is None:
        pytest.skip("needs a C++ compiler")
    if request.param == "portable":
        monkeypatch.setattr(native, "library", portable)
    with forced("auto"):
        yield torch.device("cpu")
