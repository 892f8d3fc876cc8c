"""Blocks whose weights live in host memory and are on the device only while they are used.

    residence = Residence(blocks, transfers)
    with residence.here(3, then=4):                  # 4 comes meanwhile
        blocks[3](x, rotation, "full")
    with residence.here(3, then=2, changes=True):    # what an update has made of them goes back
        ...

Parameters and buffers stay the same objects, which the optimizer has too; only their data change
places.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from lowmem.transfers import Coming, Transfers


@dataclass
class Residence:
    """`blocks` with all their tensors in host memory from now on; their values are lost."""

    blocks: Sequence[nn.Module]
    transfers: Transfers
    _homes: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    _coming: dict[int, list[Coming]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for block in self.blocks:
            block.requires_grad_(False)  # or its tensors could not be shared with the optimizer
            tensors = block.state_dict(keep_vars=True).values()
            self._homes.append([(each, self.transfers.host_like(each)) for each in tensors])
        for index in range(len(self.blocks)):
            self._leave(index)

    @contextmanager
    def here(self, index: int, then: int | None, *, changes: bool = False) -> Iterator[None]:
        """Inside, the weights of a block are on the device, and those of block `then` come."""
        self._call(index)
        coming = self._coming.pop(index)
        if then is not None and 0 <= then < len(self.blocks):
            self._call(then)
        for (tensor, _), each in zip(self._homes[index], coming, strict=True):
            tensor.data = each.arrived()
        del coming, each
        try:
            yield
            if changes:
                for tensor, home in self._homes[index]:
                    self.transfers.store(tensor.data, home)
                self.transfers.settle()
        except BaseException:
            self._coming.clear()  # memory for what is tried next
            raise
        finally:
            self._leave(index)

    def _call(self, index: int) -> None:
        """Begin to fetch a block, unless that has begun."""
        if index not in self._coming:
            homes = self._homes[index]
            self._coming[index] = [self.transfers.fetch(home) for _, home in homes]

    def _leave(self, index: int) -> None:
        for tensor, home in self._homes[index]:
            tensor.data = home
