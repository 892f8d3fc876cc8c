"""States that live in host memory and are on the device only while their weight is updated.

    states = HostStates(transfers)
    states.put_away(name, state)      # after `init`
    states.call(name, state)          # begin to fetch them
    with states.here(name, state):    # on the device; on the host again afterwards
        ...

A state keeps its dict, its keys and its numbers; only its tensors change places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from lowmem.optim.formats import State
from lowmem.transfers import Coming, Transfers


@dataclass
class HostStates:
    """The host memory of every weight's state, by weight and key."""

    transfers: Transfers
    _homes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _coming: dict[str, dict[str, Coming]] = field(default_factory=dict)

    def put_away(self, name: str, state: State) -> None:
        """Move to the host what is not there; memory of what there is no more goes.

        A tensor that has a place of its size goes there, else to a new one.
        """
        before, homes = self._homes.get(name, {}), dict[str, Tensor]()
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            home = before.get(key)
            if home is None or home.shape != value.shape or home.dtype != value.dtype:
                home = self.transfers.host_like(value)
            if value is not home:
                self.transfers.store(value, home)
            homes[key] = state[key] = home
        self.transfers.settle()
        self._homes[name] = homes

    def call(self, name: str, state: State) -> None:
        """Begin to fetch a weight's state, unless that has begun."""
        if name not in self._coming:
            homes = {key: home for key, home in self._homes[name].items() if key in state}
            self._coming[name] = {k: self.transfers.fetch(home) for k, home in homes.items()}

    @contextmanager
    def here(self, name: str, state: State) -> Iterator[None]:
        """Inside, the state is on the device.

        Kernels after that wait until it has gone back, for its memory is theirs then.
        """
        self.call(name, state)
        state.update({key: each.arrived() for key, each in self._coming.pop(name).items()})
        yield
        self.put_away(name, state)
