"""A training step on the meta device, with every byte counted.

The very model and the very optimizer are built on `meta` and run two updates and an evaluation;
`LiveBytes` sees every storage appear and die. The same tracker counts a real step on the CPU, and
both give the same number to the byte.

See docs/memory.md.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lowmem.config.schema import (
    BoundaryPlace,
    Ends,
    Matmul,
    ModelConfig,
    OptimizerConfig,
    StatePlace,
    SumFormat,
    UpdateMode,
    WeightFormat,
)
from lowmem.kernels.blockwise import lookup_tables
from lowmem.kernels.dispatch import rehearsing
from lowmem.kernels.grouped_weight import Weight
from lowmem.kernels.random_normal import lookup_table
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.phases import current_phase, phase, sentence
from lowmem.planner.plan import Choice, PhasePeak
from lowmem.planner.workspaces import scratch_of_operators
from lowmem.transfers import HOST

GRANULE = 512  # the CUDA caching allocator rounds every request up to it
_STRAY_BYTES = 2**20  # more than this in real memory during a rehearsal is a bug

GATHER, STEP, EVALUATE = SEGMENTS = ("forward and backward", "update", "evaluation")

VISITED: dict[UpdateMode, int] = {
    "unfused": 2,
    "fused+subspace": 2,
    "fused": 1,
    # The first, one in the middle, the one before which states are sent for, and the last; what
    # waits between blocks is as large as for all of them.
    "layer-major": 4,
}
"""Micro-batches of a rehearsed update: more would add nothing new."""

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
            self.highest[kind] = PhasePeak(kind, live, _ordered(parts), sentence(phases))
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


IN_PLACE = {
    getattr(torch.ops.aten, name)
    for name in [
        "mul_",
        "add_",
        "sub_",
        "div_",
        "addcmul_",
        "addcdiv_",
        "clamp_",
        "sqrt_",
        "neg_",
        "exp_",
        "copy_",
        "zero_",
        "fill_",
        "addmm_",
        "bitwise_and_",
        "bitwise_xor_",
        "nan_to_num_",
    ]
}
"""Operators that only overwrite their first argument: on meta there is nothing to do."""


_Made = tuple[torch.Size, tuple[int, ...], torch.dtype]
_made: dict[Any, list[_Made] | None] = {}


def remembered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs); on meta, what only makes new tensors infers their shapes once.

    Many shape functions are Python and take a hundred times longer than the tensor's own making.
    """
    key = _call(func, args, kwargs)
    if key is None:
        return func(*args, **kwargs)
    if (known := _made.get(key)) is not None:
        new = [_empty(*each) for each in known]
        return new[0] if len(func._schema.returns) == 1 else tuple(new)
    out = func(*args, **kwargs)
    new = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
    if new and all(isinstance(each, Tensor) and _is_plain(each) for each in new):
        _made[key] = [(each.shape, each.stride(), each.dtype) for each in new]
    return out


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides the shapes of an operator's results, hashable; None: this one must run."""
    if not _makes_new_tensors(func):
        return None
    parts: list[Any] = [func]
    for value in itertools.chain(args, *kwargs.items()):
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            parts.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            if any(isinstance(each, Tensor) for each in value):
                return None
            parts.append(tuple(value))
        else:
            parts.append((type(value), value))  # 1 and 1.0 promote differently
    return tuple(parts)


@cache
def _makes_new_tensors(func: Any) -> bool:
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return all(each is None for each in aliases) and bool(schema.returns)


def _is_plain(tensor: Tensor) -> bool:
    """Would its shape and strides make the same storage again?"""
    if not tensor.is_meta or tensor.storage_offset():
        return False
    made = _empty(tensor.shape, tensor.stride(), tensor.dtype)
    return made.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()


def _empty(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed update needs; the fields are those of LiveBytes.

    persistent: what lives as long as the run, by part. segments: by name of SEGMENTS.
    phases: the worst moment of every kind of phase, the highest first. host: bytes of host memory.
    """

    tensors: int
    parts: dict[str, int]
    instant: str
    events: list[tuple[int, int]]
    phases: list[PhasePeak]
    persistent: dict[str, int] = field(default_factory=dict)
    segments: dict[str, Segment] = field(default_factory=dict)
    host: int = 0


def rehearse(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    choice: Choice,
    seq_len: int,
    *,
    attention: str,
    workspace: int = 0,
    updates: int = 1,
) -> Rehearsal:
    """Run updates and an evaluation batch on meta and return their peak.

    attention: the operator that the planned device will use. workspace: bytes that libraries hold
    throughout. updates: every state exists before the first, so a second changes nothing but the
    classic allocator's holes.
    """
    tracker = LiveBytes("meta", scratch=attention != "cpu")
    llama = model_on_meta(
        model,
        choice.weights,
        choice.recompute,
        attention,
        keep_logits=choice.logits == "keep",
        ends=choice.ends,
        boundaries=choice.boundaries,
        blocks=choice.blocks,
        compiled=choice.compiled,
        matmul=choice.matmul,
    )
    with standing_for(attention):
        owner = optimizer_on_meta(llama, optimizer, choice.update, choice.sums, choice.place)
    owner.attach(llama)
    track_persistent(tracker, owner)
    libraries = torch.empty(workspace, dtype=torch.uint8, device="meta")
    tracker.track([libraries], "workspace")
    persistent = tracker.parts()
    with tracker, standing_for(attention):
        for _ in range(updates):
            with tracker.segment(GATHER):
                loss_and_norm = update(llama, owner, choice, seq_len)
            with tracker.segment(STEP):
                owner.step()
            del loss_and_norm  # training reads them after the step
        with tracker.segment(EVALUATE):
            evaluate(llama, choice, seq_len)
    del libraries
    return Rehearsal(
        tracker.peak,
        _ordered(tracker.peak_parts),
        sentence(tracker.peak_phase),
        tracker.events,
        tracker.phase_peaks(),
        persistent,
        tracker.segments,
        tracker.host_peak,
    )


def model_on_meta(
    model: ModelConfig,
    weights: WeightFormat,
    recompute: str,
    attention: str,
    *,
    keep_logits: bool = False,
    ends: Ends = "exact",
    boundaries: BoundaryPlace = "keep",
    blocks: StatePlace = "device",
    compiled: bool = False,
    matmul: Matmul = "exact",
) -> Llama:
    """The very model that would be trained, without memory."""
    return Llama(
        model,
        dtype=compute_dtype(weights, "cpu" if attention == "cpu" else "cuda"),
        device="meta",
        int8=weights == "int8",
        int8_ends=ends == "int8",
        recompute=recompute,
        keep_logits=keep_logits,
        attention=attention,
        boundaries=boundaries,
        blocks=blocks,
        compiled=compiled,
        matmul=matmul,
    )


def optimizer_on_meta(
    llama: Llama,
    optimizer: OptimizerConfig,
    mode: UpdateMode,
    sums: SumFormat = "fp32",
    place: StatePlace = "device",
) -> Optimizer:
    """Its optimizer, when that holds most."""
    owner = build_optimizer(
        optimizer.model_copy(update={"place": place}),
        llama.weights(),
        llama.roles(),
        mode=mode,
        seed=0,
        head_dim=llama.config.head_dim,
        sums=sums,
    )
    hold_worst_window(owner)
    owner.away = llama.away()
    return owner


def standing_for(attention: str) -> AbstractContextManager[None]:
    """Tensors on meta are cut as on the device that has this attention."""
    return rehearsing("cpu" if attention == "cpu" else "cuda")


def track_persistent(
    tracker: LiveBytes, optimizer: Optimizer, names: Iterable[str] | None = None
) -> None:
    """Count what lives as long as the run. names: of the weights; all of the optimizer's else."""
    for part, tensor in [*persistent_tensors(optimizer, names), *host_tensors(optimizer, names)]:
        tracker.track([tensor], part)


def persistent_tensors(
    optimizer: Optimizer, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(part, tensor) of weights, states and the tables they need; a table may come repeatedly.

    Also of what host sums pass through, which belongs to no weight; what lives in host memory is
    left out.
    """
    chosen = list(optimizer.slots if names is None else names)
    if optimizer.staging is not None:
        yield from (("staging", place) for place in optimizer.staging.places)
    for name in chosen:
        slot = optimizer.slots[name]
        if name not in optimizer.away:
            yield from (("weights", tensor) for tensor in stored(slot.weight))
        for key, value in slot.state.items() if optimizer.states == "device" else ():
            if isinstance(value, Tensor):
                yield "projections" if key.endswith("basis") else "states", value
    yield from tables(optimizer, chosen)


def host_tensors(
    optimizer: Optimizer, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(HOST, tensor) of what lives in host memory for the whole run."""
    for name in optimizer.slots if names is None else names:
        slot = optimizer.slots[name]
        if name in optimizer.away:
            yield from ((HOST, tensor) for tensor in stored(slot.weight))
        for value in slot.state.values() if optimizer.states == "host" else ():
            if isinstance(value, Tensor):
                yield HOST, value


def tables(
    optimizer: Optimizer, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(part, tensor) of the constants that 8-bit states and drawn bases look up."""
    for name in optimizer.slots if names is None else names:
        device = str(optimizer.device)
        for key in optimizer.slots[name].state:
            if key.endswith(".codes"):
                yield from (("states", table) for table in lookup_tables(device))
            if key.endswith(("basis", "basis.codes")):  # its start is random, or all of it
                yield "projections", lookup_table(device)


def bytes_by_part(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes of real tensors by part, each storage once and rounded up as the allocator does."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for part, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[part] = found.get(part, 0) + -(-storage.nbytes() // GRANULE) * GRANULE
    return found


def stored(weight: Weight) -> list[Tensor]:
    """The tensors that hold a weight."""
    return [weight] if isinstance(weight, Tensor) else [weight.codes, weight.scales, weight.zeros]


def update(
    model: Llama, optimizer: Optimizer, choice: Choice, seq_len: int
) -> tuple[Tensor, Tensor]:
    """The gradients of one update, and its loss and norm; `optimizer.step()` is next."""
    made = min(choice.accumulate, VISITED[choice.update])
    return gather(
        model,
        optimizer,
        MadeAnew(lambda: (_batch(choice.micro_batch, seq_len) for _ in range(made))),
        count=choice.accumulate if choice.update == "layer-major" else made,
        tokens=1,
        lr=0.0,
        clip=choice.clip,
    )


def evaluate(model: Llama, choice: Choice, seq_len: int) -> None:
    """An evaluation batch of the size of a micro-batch."""
    with phase("evaluation"):
        inputs, targets = _batch(choice.micro_batch, seq_len)
        model.loss_sum(inputs, targets)


def _batch(rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    shape = (rows, seq_len)
    return (
        torch.empty(shape, dtype=torch.int64, device="meta"),
        torch.empty(shape, dtype=torch.int64, device="meta"),
    )


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: parts[name] for name in PARTS if parts.get(name)}
