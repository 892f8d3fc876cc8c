"""What stands between the blocks: their inputs, which wait for backward on the device or the host.

In layer-major order those of all micro-batches:

    boundaries = Boundaries("host")
    boundaries.begin(tokens=131072, like=x)
    boundaries.put(0, place, x)                          # x: (n, h), the rows of one micro-batch
    for place, (x, grad) in boundaries.read([0, 1], places): ...

A layer is one (tokens, h) tensor: on the device, from its first use until it is closed, or in host
memory, from which the rows of the next micro-batch come while those of the present are worked on.
Backward puts the gradient of a block's input where the input was.

Elsewhere those of one micro-batch, on the device with what else a block keeps, or on the host:

    inputs = HostInputs(last=31, transfers=transfers)
    turn = inputs.begin()
    inputs.leave(0, x)                                   # while block 0 is computed, and so on
    inputs.bring(31, kept, turn)                         # sends for that of block 30
    inputs.bring(30, kept, turn)                         # kept["x"], and sends for that of block 29
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.config.schema import BoundaryPlace
from lowmem.transfers import Coming, Transfers

Kept = dict[str, Tensor]  # by a block, between its forward and its backward


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

    @property
    def layer_bytes(self) -> int:
        """Of a layer that waits on the device; 0: none does."""
        if self.where == "host":
            return 0
        return max((layer.nbytes for layer in self._layers.values()), default=0)

    def lend(self) -> None:
        """Move to host memory what waits, in the middle of an update, and all that comes after.

        Rows that are being worked on stay on the device until their block is through.
        """
        self.where = "host"
        for index in self._layers:
            home = self._new_layer()
            self._transfers.store(self._layers[index], home)
            self._layers[index] = home
        if self._layers:
            self._transfers.settle()

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


@dataclass
class HostInputs:
    """The inputs of all blocks but the last, whose backward follows at once, for a micro-batch.

    last: the index of that block. They leave while their block is computed, and come back while
    the block above goes backward. The host memory is kept for the next micro-batches.
    """

    last: int
    transfers: Transfers
    _turn: int = 0
    _homes: dict[int, Tensor] = field(default_factory=dict)
    _away: dict[int, Tensor] = field(default_factory=dict)  # rows of `_homes`
    _coming: dict[int, Coming] = field(default_factory=dict)

    def begin(self) -> int:
        """Start a forward; a number to show in its backward."""
        self._away.clear()
        self._coming.clear()
        self._turn += 1
        return self._turn

    def leave(self, index: int, x: Tensor) -> bool:
        """Begin to copy a block's input (n, h) to the host; whether it goes.

        It stays in memory until the next block begins; nobody may change it any more.
        """
        self.transfers.settle()
        if index == self.last:
            return False
        home = self._homes.get(index)
        if home is None or len(home) < len(x):
            self._homes.pop(index, None)  # before the larger one is made
            self._homes[index] = home = self.transfers.host_like(x)
        self._away[index] = home[: len(x)]
        self.transfers.store(x, self._away[index])
        return True

    def bring(self, index: int, kept: Kept, turn: int) -> None:
        """Give a block its input back, and send for that of the block below.

        RuntimeError: another forward has taken the place of the one that this backward belongs to.
        """
        if turn != self._turn:
            raise RuntimeError(
                "block inputs in host memory are those of the last forward: call backward before "
                "the next forward"
            )
        if index != self.last:
            kept["x"] = self._coming.pop(index).arrived()
        if index > 0:
            self._coming[index - 1] = self.transfers.fetch(self._away.pop(index - 1))
