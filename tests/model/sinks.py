"""Sinks for tests."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.model.llama import Llama


class Nothing:
    """Throws every gradient away."""

    def receive(self, name: str, gradient: Tensor) -> None: ...

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None: ...


class Whole:
    """Shows every gradient to `show(name, gradient)`: those in row slices when complete."""

    def __init__(self, model: Llama, show: Callable[[str, Tensor], None]) -> None:
        self.receive = show
        self._model = model
        self._slices: dict[str, list[Tensor]] = {}

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        slices = self._slices.setdefault(name, [])
        assert start == sum(map(len, slices)), (name, start)
        slices.append(rows)
        if start + len(rows) == self._model.weights()[name].shape[0]:
            self.receive(name, torch.cat(self._slices.pop(name)))
