"""What an optimizer holds of one parameter, and how far its gradient has arrived."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem.optim.formats import State
from lowmem.optim.method import ByRows, Method, RowUpdate
from lowmem.optim.sums import Held
from lowmem.optim.weights import aligned


@dataclass
class Arriving:
    """A gradient of which the rows before `stop` have arrived.

    whole: where it is put together. update: what applies rows at once; None where the method
    leaves the weight as it is. survey: what all its rows have told beforehand.
    """

    stop: int = 0
    whole: Tensor | None = None
    update: RowUpdate | None = None
    survey: Tensor | None = None


@dataclass
class Slot:
    """One parameter with its method, its state and what is kept of its gradient.

    summed: micro-batches that are in `kept`. prepared: the update for which a state was last
    changed before the step, by a refresh in backward or an estimate of the curvature; a repeated
    update does neither again.
    """

    weight: Tensor | Any  # a GroupedWeight where one was added
    method: Method
    weight_decay: float
    state: State
    kept: Held | None = None
    arriving: Arriving | None = None
    summed: int = 0
    prepared: int = -1

    @property
    def goes_by_rows(self) -> bool:
        return isinstance(self.method, ByRows) and self.method.needs.by_rows

    def next_rows(self, name: str, start: int, count: int) -> Arriving:
        """What has arrived of the gradient with `count` more rows; ValueError: others are next."""
        arriving = self.arriving or Arriving()
        rows = self.weight.shape[0]
        stop = start + count
        if start != arriving.stop or not count or stop > rows or not aligned(self.weight, start):
            raise ValueError(
                f"rows {start} to {stop} of {name} arrived where row {arriving.stop} of {rows} is "
                "next; slices are in order and begin with a block of elements"
            )
        arriving.stop = stop
        self.arriving = arriving
        return arriving
