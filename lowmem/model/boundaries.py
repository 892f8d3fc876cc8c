"""What stands between the blocks in layer-major order: their inputs, for all micro-batches.

    boundaries = Boundaries("host")
    boundaries.begin(layers=33, tokens=131072, like=x)
    boundaries.put(0, place, x)                          # x: (n, h), the rows of one micro-batch
    for place, (x, grad) in boundaries.read([0, 1], places): ...

A layer is one (tokens, h) tensor: on the device, from its first use until it is closed, or in host
memory, from which the rows of the next micro-batch come while those of the present are worked on.
Backward puts the gradient of a block's input where the input was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.config.schema import BoundaryPlace
from lowmem.transfers import Coming, Transfers


@dataclass(frozen=True)
class Place:
    """A micro-batch: rows start to stop (excluded) of every layer, in sequences of `length` tokens.

    left: micro-batches of the update after it.
    """

    start: int
    stop: int
    length: int
    left: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass
class Boundaries:
    """The layers 0 (the embedding's output) to L (the last block's) of one update."""

    where: BoundaryPlace
    transfers: Transfers | None = None
    _layers: dict[int, Tensor] = field(default_factory=dict)
    _tokens: int = 0
    _like: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, tokens: int, like: Tensor) -> None:
        """Start an update of at most so many tokens; like: (n, h), of the layers' dtype."""
        if self.where == "keep" or tokens != self._tokens:
            self._layers.clear()
        self._tokens, self._like = tokens, like.new_empty(0, like.shape[1])
        if self.transfers is None:
            self.transfers = Transfers(like.device)

    def put(self, layer: int, place: Place, x: Tensor) -> None:
        """Keep the rows of a micro-batch; nobody may change x any more."""
        if layer not in self._layers:
            self._layers[layer] = self._new_layer()
        rows = self._layers[layer][place.rows]
        if self.where == "keep":
            rows.copy_(x)
        else:
            self._transfers.store(x, rows)

    def read(
        self, layers: Sequence[int], places: Sequence[Place]
    ) -> Iterator[tuple[Place, list[Tensor]]]:
        """The rows of these layers, micro-batch by micro-batch; they may be changed."""
        coming = self._coming(layers, places[0])
        for number, place in enumerate(places):
            here = [each.arrived() for each in coming]
            coming = self._coming(layers, places[number + 1]) if place.left else []
            yield place, here
        if self.where == "host":
            self._transfers.settle()

    def close(self, layer: int) -> None:
        """Nobody reads this layer again in this update."""
        if self.where == "keep":
            del self._layers[layer]

    def _coming(self, layers: Sequence[int], place: Place) -> list[Coming]:
        rows = [self._layers[layer][place.rows] for layer in layers]
        if self.where == "keep":
            return [Coming(each) for each in rows]
        return [self._transfers.fetch(each) for each in rows]

    def _new_layer(self) -> Tensor:
        shape = self._tokens, self._like.shape[1]
        if self.where == "keep":
            return self._like.new_empty(shape)
        return self._transfers.host(shape, self._like.dtype)

    @property
    def _transfers(self) -> Transfers:
        assert self.transfers is not None, "no update has begun"
        return self.transfers
