"""Out-of-memory errors at chosen tensor operations, where a card would raise its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Faults(TorchDispatchMode):
    """Inside, every operation is counted that may allocate; `wanted(number)` says which one fails.

    Views, and what only writes one tensor into another, never allocate. The operation has not run
    when it fails, as on a card, where memory is asked for before a kernel is launched.
    """

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        super().__init__()
        self.wanted = wanted
        self.count = 0
        self.raised = 0
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if may_allocate(func) and not _on_meta(args, kwargs or {}):
            self.count += 1
            if self.wanted(self.count):
                self.raised += 1
                self.names.append(str(func))
                raise torch.OutOfMemoryError(f"CUDA out of memory, invented for {func}")
        return func(*args, **(kwargs or {}))


_NEVER = {"copy_", "zero_", "fill_", "detach", "detach_", "_local_scalar_dense", "equal"}


def may_allocate(func: Any) -> bool:
    schema = func._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not view and schema.name.removeprefix("aten::") not in _NEVER


def _on_meta(args: Any, kwargs: dict[str, Any]) -> bool:
    """A planner's rehearsal takes no memory."""
    if any(isinstance(each, torch.Tensor) and each.is_meta for each in args):
        return True
    return "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "meta"


def every_one_once() -> Callable[[int], bool]:
    """Every operation fails, and its repetition does not."""
    return lambda number: number % 2 == 1
