"""The content of one checkpoint, apart from the disk: live tensors, or copies in host memory.

capture (checkpoint.py)   -> Snapshot of live tensors     written at once, or
HostCopy.of(snapshot)     -> Snapshot of copies           written while training goes on
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.transfers import host_memory

Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Position:
    """Where a run stands: updates done, target tokens seen, and what later decisions depend on.

    carried: "guard" (`divergence.Memory`), "best" ({"update", "loss"}, None before there is one)
    and, of a run that met the end of memory, "ladder" (`rungs.Rungs`), as plain JSON.
    """

    update: int = 0
    tokens: int = 0
    carried: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorFile:
    """What one safetensors file holds."""

    tensors: Named
    metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, by path inside it."""

    at: Position
    files: dict[str, bytes]
    tensors: dict[str, TensorFile]

    @property
    def bytes(self) -> int:
        """Of all contents, without the headers of the tensor files."""
        return sum(map(len, self.files.values())) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(
            tensor.numel() * tensor.element_size()
            for file in self.tensors.values()
            for _, tensor in file.tensors
        )


class HostCopy:
    """Host memory that holds the tensors of one snapshot; made at the first and used again.

    Pinned for tensors of a card, so that copying is one transfer.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, snapshot: Snapshot) -> None:
        """Make the memory for such a snapshot; touched, for the system gives pages only then."""
        for path, file in snapshot.tensors.items():
            for name, tensor in file.tensors:
                self._buffers[path, name] = _host_like(tensor).zero_()

    def of(self, snapshot: Snapshot) -> Snapshot:
        """The same content in this memory; what was in it before is overwritten."""
        before, self._buffers = self._buffers, {}
        cards: set[torch.device] = set()
        copied = {}
        for path, file in snapshot.tensors.items():
            pairs = []
            for name, tensor in file.tensors:
                buffer = before.pop((path, name), None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = _host_like(tensor)
                buffer.copy_(tensor, non_blocking=True)
                self._buffers[path, name] = buffer
                pairs.append((name, buffer))
                if tensor.is_cuda:
                    cards.add(tensor.device)
            copied[path] = replace(file, tensors=pairs)
        for card in cards:
            torch.cuda.synchronize(card)
        return replace(snapshot, tensors=copied)


def _host_like(tensor: Tensor) -> Tensor:
    return host_memory(tuple(tensor.shape), tensor.dtype, tensor.device)
