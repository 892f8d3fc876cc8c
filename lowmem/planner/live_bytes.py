"""Every storage that appears and dies, counted, on the meta device or in a real step.

with LiveBytes("cpu") as tracker:
    ...
tracker.peak, tracker.peak_parts
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lowmem.phases import current_phase, sentence
from lowmem.planner.meta_operators import IN_PLACE, remembered
from lowmem.planner.plan import PhasePeak
from lowmem.planner.workspaces import scratch_of_operators
from lowmem.transfers import HOST

GRANULE = 512  # the CUDA caching allocator rounds every request up to it
_STRAY_BYTES = 2**20  # more than this in real memory during a rehearsal is a bug

PERSISTENT = ("weights", "states", "projections", "staging")
PARTS = (
    *PERSISTENT,
    "gradients",
    "activations",
    "loss",
    "update",
    "batch",
    "workspace",
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a run. peak: highest bytes inside. end: bytes at its end.

    events: (start, stop) in the list of allocations, one for each time that it ran.
    """

    peak: int
    end: int
    events: list[tuple[int, int]]


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages, by part, each rounded up to 512, with the peak and its moment.

    scratch: add what CUDA operators allocate out of sight. host, host_peak: bytes beside the
    device, which count nowhere else. events: (id, +bytes) when a storage appears, (id, -bytes) when
    it dies: for the allocator.
    """

    def __init__(self, device_type: str, scratch: bool = False) -> None:
        super().__init__()
        self.device_type = device_type
        self._workspaces = scratch_of_operators() if scratch else {}
        self.events: list[tuple[int, int]] = []
        self.live = 0
        self.peak = 0
        self.host = 0  # bytes of host memory beside the device
        self.host_peak = 0
        self.peak_parts: dict[str, int] = {}
        self.peak_phase: tuple[str, ...] = ()
        self.segments: dict[str, Segment] = {}
        self._highest = 0  # in the open segment
        self.highest: dict[str, PhasePeak] = {}  # by kind of phase
        self._parts: defaultdict[str, int] = defaultdict(int)
        self._seen = WeakIdKeyDictionary()
        self._ids = itertools.count()

    def track(self, tensors: Mapping[str, Tensor] | list[Tensor], part: str) -> None:
        """Count tensors that exist beforehand."""
        for tensor in tensors.values() if isinstance(tensors, Mapping) else tensors:
            self._add(tensor, part)

    def parts(self) -> dict[str, int]:
        """What the live bytes are for, now."""
        return {name: size for name, size in self._parts.items() if size}

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        """Note the highest bytes inside and what is left at the end; segments do not nest.

        Of a name that comes again the higher peak and the last end are kept.
        """
        self._highest, start = self.live, len(self.events)
        yield
        earlier = self.segments.get(name, Segment(0, 0, []))
        runs = [*earlier.events, (start, len(self.events))]
        self.segments[name] = Segment(max(earlier.peak, self._highest), self.live, runs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in IN_PLACE and args[0].is_meta:
            return args[0]
        out = remembered(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, part_of(current_phase()))
        scratch = self._workspaces.get(func)
        if scratch is not None:
            self._use_briefly(scratch(*args))
        return out

    def _use_briefly(self, scratch: int) -> None:
        """Memory that an operator took and gave back before it returned."""
        self._mark(scratch, "workspace")
        number = next(self._ids)
        self.events += [(number, scratch), (number, -scratch)]

    def _add(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen or storage.nbytes() == 0:
            return
        if tensor.device.type != self.device_type:
            if self.device_type == "meta" and storage.nbytes() > _STRAY_BYTES:
                raise RuntimeError(
                    f"{storage.nbytes()} bytes of real memory during a rehearsal, in "
                    f"{' / '.join(current_phase())}: a factory does not name its device"
                )
            return
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        number = next(self._ids)
        self._seen[storage] = number
        if part == HOST:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            weakref.finalize(storage, self._drop_host, size)
            return
        self.live += size
        self._parts[part] += size
        self.events.append((number, size))
        weakref.finalize(storage, self._drop, number, size, part)
        self._mark(0, part)

    def _drop(self, number: int, size: int, part: str) -> None:
        self.live -= size
        self._parts[part] -= size
        self.events.append((number, -size))

    def _drop_host(self, size: int) -> None:
        self.host -= size

    def _mark(self, scratch: int, part: str) -> None:
        self._highest = max(self._highest, self.live + scratch)
        live, phases = self.live + scratch, current_phase()
        kind = kind_of_phase(phases)
        is_highest = kind not in self.highest or live > self.highest[kind].tensors
        if live <= self.peak and not is_highest:
            return
        parts = self.parts()
        if scratch:
            parts[part] = parts.get(part, 0) + scratch
        if is_highest:
            self.highest[kind] = PhasePeak(kind, live, ordered(parts), sentence(phases))
        if live > self.peak:
            self.peak, self.peak_phase, self.peak_parts = live, phases, parts

    def phase_peaks(self) -> list[PhasePeak]:
        """The worst moment of every kind of phase, the highest first."""
        return sorted(self.highest.values(), key=lambda peak: -peak.tensors)


def part_of(phases: tuple[str, ...]) -> str:
    """What a storage that appears during these phases is for: one of PARTS, or HOST."""
    for name in reversed(phases):
        if name == HOST:
            return HOST
        if name in ("update", "refresh"):
            return "update"
        if name == "hold" or name.startswith("gradient"):
            return "gradients"
        if name in ("loss", "batch"):
            return name
    return "activations"


def kind_of_phase(phases: tuple[str, ...]) -> str:
    """The kind of work these phases are: forward, loss, backward, ..., or other outside of all."""
    for name in ("evaluation", "curvature"):
        if name in phases:
            return name
    for name in reversed(phases):
        if name in ("update", "refresh", "loss"):
            return name
    if any(name.startswith(("backward", "gradient")) for name in phases):
        return "backward"
    return "forward" if phases else "other"


def ordered(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: parts[name] for name in PARTS if parts.get(name)}
