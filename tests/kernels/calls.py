"""Which kernels are called."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Inside, lowmem's own operators are noted with their arguments, and all are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, tuple[Any, ...]]] = []
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operators += 1
        if func.namespace == "lowmem":
            self.kernels.append((func, args))
        return func(*args, **(kwargs or {}))
