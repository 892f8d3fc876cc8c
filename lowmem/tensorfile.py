"""safetensors files as a stream: one tensor in host memory at a time, the checksum on the way.

The format is 8 bytes little-endian length n, n bytes of JSON, then the data without gaps:

    {"__metadata__": {"update": "3"},
     "model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}

so the header follows from names, dtypes and shapes alone, before any tensor is copied.

Source: github.com/huggingface/safetensors, section "Format" of its README.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from lowmem.errors import CheckpointError

if TYPE_CHECKING:  # torch takes seconds to import, and checking a checksum needs none
    import torch
    from torch import Tensor

_DTYPES = {  # in the order of the reference library: falling alignment
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class Pending:
    """A tensor that `make` makes when it is written, and that is forgotten afterwards."""

    dtype: "torch.dtype"
    shape: tuple[int, ...]
    make: Callable[[], "Tensor"]


Writable: TypeAlias = "Tensor | Pending"


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, Writable]], metadata: dict[str, str] | None = None
) -> str:
    """Write a safetensors file, sync it, and return the sha256 of all of it as hex.

    Tensors may lie on any device and need not be contiguous; each is copied to the host alone,
    but all of `tensors` is held until the end: give what lives anyway or is Pending, not copies.
    They are laid out by dtype, then name, as the reference library does, so that data is aligned
    and the same tensors give the same file.
    ValueError: a name twice, the name "__metadata__", a dtype that lowmem never stores, or a
    Pending that makes another dtype or shape than it said.
    OSError: the disk; what is then at `path` is not complete.
    """
    order = list(_DTYPES)
    pairs = sorted(tensors, key=lambda pair: (order.index(_dtype(*pair)), pair[0]))
    header = _header(pairs, metadata)
    digest = hashlib.sha256(header)
    with open(path, "wb") as file:
        file.write(header)
        for name, tensor in pairs:
            _append(file, digest, _made(name, tensor) if isinstance(tensor, Pending) else tensor)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensors(path: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name, tensor on the CPU) one by one; only the current tensor is in memory.

    CheckpointError: the file is missing, cut off or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_tensor(path: Path, name: str) -> "Tensor":
    """One tensor of a file on the CPU. CheckpointError: as `read_tensors`, or no such tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def tensor_names(path: Path) -> list[str]:
    """Of a file, without reading any tensor. CheckpointError: as `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stays_inside(name: str) -> bool:
    """Is this name of a manifest a plain path below the manifest's own folder?"""
    parts = PurePosixPath(name).parts
    return bool(parts) and not {"..", "/", "//"} & set(parts) and not set(name) & set("\\:\0")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}",
        str(error),
        "resume from another checkpoint of the run, or copy the file again",
    )


def _made(name: str, pending: Pending) -> "Tensor":
    tensor = pending.make()
    if (tensor.dtype, tuple(tensor.shape)) != (pending.dtype, pending.shape):
        made, said = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, pending))
        raise ValueError(f"{name} became {made} instead of {said}")
    return tensor


def _dtype(name: str, tensor: Writable) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}; a file can hold {', '.join(_DTYPES)}")
    return dtype


def _header(pairs: list[tuple[str, Writable]], metadata: dict[str, str] | None) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in pairs:
        if name in table or name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is taken; names in a file must differ")
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        table[name] = {
            "dtype": _DTYPES[_dtype(name, tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _append(file: BinaryIO, digest: "hashlib._Hash", tensor: "Tensor") -> None:
    """Write the elements in row-major order; a CPU tensor that is contiguous is not copied."""
    import torch

    # A function of its own, so that a copy is gone before the next one is made.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # As bytes, because numpy (and thus the buffer protocol) has no bfloat16.
    data = flat.view(torch.uint8).numpy().data
    digest.update(data)
    file.write(data)
