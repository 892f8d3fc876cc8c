"""Which implementation of an operator runs where: the one place that decides it.

    WRITE = Kernel("write_codes(Tensor x, Tensor(a!) codes) -> ()", triton="write_codes_triton")

    if WRITE.runs_on(x):            # Triton on a CUDA device, compiled C++ on a CPU
        codes = torch.empty(...)    # whoever calls allocates: a kernel fills what it is given
        WRITE(x, codes)
    else:
        ...                         # the plain PyTorch reference

So a kernel needs no memory of its own, on meta it has nothing to do, and a rehearsal sees every
byte of the path that will run on the planned device. A reference stays plain PyTorch, whose
temporaries are seen one by one.

LOWMEM_KERNELS = auto | reference | triton. reference: no kernel anywhere. triton: on the CPU too,
where Triton interprets it if TRITON_INTERPRET=1 (slow, for tests).
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import ConfigError, HardwareError
from lowmem.kernels import native

VARIABLE = "LOWMEM_KERNELS"
CHOICES = ("auto", "reference", "triton")

_library = torch.library.Library("lowmem", "DEF")
_meta_stands_for = ["cuda"]
_forced: list[str] = []


@contextmanager
def rehearsing(device: str) -> Iterator[None]:
    """Inside, a tensor on meta is treated as it would be on that device."""
    _meta_stands_for.append(device)
    try:
        yield
    finally:
        _meta_stands_for.pop()


def device_type(tensor: Tensor) -> str:
    """Where the tensor is; of one on meta, where it would be."""
    return _meta_stands_for[-1] if tensor.is_meta else tensor.device.type


@contextmanager
def forced(chosen: str) -> Iterator[None]:
    """Inside, this choice holds instead of LOWMEM_KERNELS."""
    _forced.append(chosen)
    try:
        yield
    finally:
        _forced.pop()


def choice() -> str:
    """What is forced, or the value of LOWMEM_KERNELS. ConfigError: no such choice."""
    found = _forced[-1] if _forced else os.environ.get("LOWMEM_KERNELS") or "auto"
    if found not in CHOICES:
        raise ConfigError(
            f"{VARIABLE} = {found}", f"it is one of {', '.join(CHOICES)}", f"{VARIABLE}=auto"
        )
    return found


@cache
def triton_installed() -> bool:
    """Can the planned card's machine be taken to have Triton? PyTorch for CUDA on Linux brings it,
    so a machine without CUDA, which plans for another one, says nothing about it."""
    return importlib.util.find_spec("triton") is not None or torch.version.cuda is None


def interpreted() -> bool:
    """Would Triton interpret kernels on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Kernel:
    """An operator of the library `lowmem` that writes into tensors it is given.

    schema: without the library's name; returns nothing. triton: the module of kernels/ with the
    Triton launcher, a function of the operator's name; native: is there one in C++ too? Both take
    the schema's arguments, contiguous tensors on one device.
    """

    schema: str
    triton: str
    native: bool = False
    name: str = field(init=False)
    operator: Any = field(init=False)  # the overload that torch's dispatcher calls

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.schema.partition("(")[0])
        _library.define(self.schema)
        _library.impl(self.name, self._on_cuda, "CUDA")
        _library.impl(self.name, self._on_cpu, "CPU")
        _library.impl(self.name, lambda *_: None, "Meta")
        object.__setattr__(self, "operator", getattr(torch.ops.lowmem, self.name).default)

    def __call__(self, *arguments: Any) -> None:
        # A kernel counts elements, and would read and write others than those of a strided view.
        assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor)), self.name
        self.operator(*arguments)

    def runs_on(self, tensor: Tensor) -> bool:
        """Is it this that runs where the tensor is (of one on meta: would be), or the reference?"""
        chosen = choice()
        if chosen != "auto":
            return chosen == "triton"
        if device_type(tensor) == "cpu":
            return self.native and native.library() is not None
        return triton_installed()

    def implementation(self, device: str) -> str:
        """What runs on "cpu" or "cuda", for people."""
        with rehearsing(device):
            if not self.runs_on(torch.empty(0, device="meta")):
                return "reference"
        return "triton" if device == "cuda" or choice() == "triton" else "C++"

    def _on_cuda(self, *arguments: Any) -> None:
        try:
            self._launcher()(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith("triton"):
                raise
            raise HardwareError(
                f"the kernel {self.name} does not compile for this device",
                str(error).strip().splitlines()[-1] if str(error).strip() else repr(error),
                f"{VARIABLE}=reference runs plain PyTorch instead",
            ) from error

    def _on_cpu(self, *arguments: Any) -> None:
        if choice() != "triton":
            native.call(self.name, arguments)
            return
        if not interpreted():
            raise ConfigError(
                f"{VARIABLE} = triton on the CPU",
                "Triton only interprets there, when it is told to before it is imported",
                f"TRITON_INTERPRET=1, or {VARIABLE}=auto",
            )
        self._launcher()(*arguments)

    def _launcher(self) -> Callable[..., None]:
        # Imported late: without a CUDA device nobody needs Triton.
        module = importlib.import_module(f"lowmem.kernels.{self.triton}")
        launcher: Callable[..., None] = getattr(module, self.name)
        return launcher
