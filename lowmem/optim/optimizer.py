"""The optimizer: one path for a gradient, whether it arrives in backward or at `step`.

    receive   refresh if due -> compress -> add to what is kept      (per micro-batch, per weight)
    apply     kept -> method.update -> write into the weight         (per update, per weight)

    mode             kept between receive and apply               apply happens
    unfused          the gradient itself                          in step()
    fused+subspace   its projection (the gradient for methods     in step()
                     that need it whole)
    fused            nothing                                      at once, in the middle of backward
    layer-major      the gradient itself, of one block            at its last micro-batch

Gradients may arrive in row slices (`receive_rows`). They are added to what is kept, or in `fused`
mode applied slice by slice; only a method that must see the whole gets it put together first.

Weights change only in `apply` and `apply_rows`. Sums over micro-batches are float32, or what
`sums.py` has.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lowmem.config.schema import MOVE_EARLY, StatePlace, SumFormat, UpdateMode
from lowmem.kernels.grouped_weight import Weight
from lowmem.naming import seed_of
from lowmem.optim.host_states import HostStates
from lowmem.optim.method import ByRows, Method, Reallocating, RowUpdate, Surveying
from lowmem.optim.place import Place
from lowmem.optim.slots import Arriving, Slot
from lowmem.optim.sums import Held, Staging, Sum, empty_sum, is_tensor, square
from lowmem.optim.weights import Step, like, row_bounds, rows_of, write
from lowmem.phases import phase
from lowmem.transfers import Transfers

_WHOLE: tuple[UpdateMode, ...] = ("unfused", "layer-major")  # modes that sum the gradient itself


@dataclass
class Optimizer:
    """Updates named weights, each by its own method; `add` puts them in its charge.

    seed: of the run, for stochastic rounding. states: where they live between updates; "host" is
    for modes that do not need them before the sums are complete. sums: the format of sums over
    micro-batches. staging: what host sums need on the device. writing: a context around everything
    that changes states or weights, in which an error leaves them half changed. moved: some weights
    have had their step of this update, and others have not.
    """

    mode: UpdateMode
    seed: int
    states: StatePlace = "device"
    slots: dict[str, Slot] = field(default_factory=dict)
    away: Collection[str] = ()  # weights that live in host memory
    updates: int = 0  # begun so far, the present one included
    lr: float = 0.0
    sums: SumFormat = "fp32"
    staging: Staging | None = None
    writing: Callable[[], AbstractContextManager[object]] = nullcontext
    moved: bool = False
    left: int = 0  # layer-major: gradients of the same weight after the one that comes next
    _micro_batches: int = 1
    _squares: list[Tensor] = field(default_factory=list)
    _square_of: dict[str, Tensor] = field(default_factory=dict)  # layer-major: by weight
    _coefficient: Tensor | None = None
    _held_only: Collection[str] | None = None
    _host: HostStates | None = None

    def __post_init__(self) -> None:
        if self.states == "host" and self.mode not in _WHOLE:
            raise ValueError(f"{self.mode} updates need the states at every micro-batch")

    def add(
        self,
        name: str,
        weight: Weight,
        method: Method,
        weight_decay: float,
        place: Place = Place(),  # noqa: B008 - frozen
    ) -> None:
        """Take charge of a weight and allocate all its state. The seeds of `place` are ours."""
        if isinstance(weight, Tensor) and weight.requires_grad:
            weight = weight.detach()  # in the same memory
        with torch.no_grad():
            own = replace(place, seed=seed_of(self.seed, name), run_seed=self.seed)
            example = like(weight)
            state = method.init(example, own)
            if self.sums == "host" and self.staging is None:
                self.staging = Staging(example)
        self.slots[name] = Slot(weight, method, weight_decay, state)
        if self.states == "host":
            if self._host is None:
                self._host = HostStates(Transfers(weight.device))  # the embedding's comes first
            self._host.put_away(name, state)

    @property
    def device(self) -> torch.device:
        """Where updates are made."""
        outside = (slot for name, slot in self.slots.items() if name not in self.away)
        return next(outside).weight.device

    @property
    def transfers(self) -> Transfers | None:
        """What moves states between host and device; None where they are on the device."""
        return None if self._host is None else self._host.transfers

    def put_states_away(self) -> None:
        """To the host, where they live there, with what was allocated since they came from it."""
        if self._host is not None:
            for name, slot in self.slots.items():
                self._host.put_away(name, slot.state)

    def attach(self, model: nn.Module) -> None:
        """Receive the model's gradients as they appear in backward.

        Our decoder hands them over itself; any other module gets a hook per parameter.
        """
        if hasattr(model, "away"):
            self.away = model.away()  # type: ignore[operator]
        if hasattr(model, "sink"):
            setattr(model, "sink", self)  # noqa: B010 - no field of nn.Module
            return
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def receive_and_drop(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            self.receive(name, grad)

        return receive_and_drop

    def begin(self, lr: float, micro_batches: int) -> None:
        """Start an update of that many micro-batches with this learning rate."""
        if self.mode == "fused" and micro_batches != 1:
            raise ValueError(f"fused updates cannot accumulate {micro_batches} micro-batches")
        self.lr, self._micro_batches = lr, micro_batches
        self.updates += 1
        self.moved = False
        self._squares.clear()
        self._square_of.clear()
        self._coefficient = None
        for slot in self.slots.values():
            slot.arriving = None
            if isinstance(slot.method, Reallocating):
                slot.method.release(slot.state)

    @torch.no_grad()
    def receive(self, name: str, grad: Tensor) -> None:
        """Take over the gradient of one micro-batch; the caller must not use it any more."""
        slot = self.slots[name]
        if self._held_only is not None:
            if name in self._held_only:
                with phase("hold"):
                    self._hold(name, grad)
            return
        if self.mode not in _WHOLE:
            if slot.kept is None:  # the first micro-batch decides the subspace
                self.prepare(slot, lambda: slot.method.refresh(grad, slot.state))
            if self.mode == "fused":
                self._squares.append(square(grad))
        with phase("hold"):
            if self.mode not in _WHOLE:
                grad = slot.method.compress(grad, slot.state)
            self._hold(name, grad)
        if self.mode == "layer-major":
            self._advance(name)
        elif self.mode == "fused":
            self.apply(name)

    @torch.no_grad()
    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Take over rows start, start + 1, ... of the gradient of one micro-batch.

        Slices arrive in order, each once; all but the first start at a multiple of 256 elements
        (for 8-bit codes also of their group), and the last one completes the gradient. ValueError
        for any other. In `fused` mode these rows of the weight may change at once.
        """
        slot = self.slots[name]
        if self._held_only is not None and name not in self._held_only:
            return
        held = self._held_only is not None or self.mode in _WHOLE
        arriving = slot.next_rows(name, start, len(rows))
        by_rows = slot.goes_by_rows or arriving.survey is not None
        if held or (by_rows and self.mode == "fused+subspace"):
            with phase("hold"):
                self._add(name, rows, start, slot.weight.shape)
        elif by_rows:
            self._squares.append(square(rows))
            self.apply_rows(name, start, rows)
        else:
            with phase("hold"):
                if arriving.whole is None:
                    arriving.whole = rows.new_empty(slot.weight.shape)
                arriving.whole[start : arriving.stop] = rows
        if arriving.stop == slot.weight.shape[0]:
            slot.arriving = None
            if arriving.whole is not None:
                self.receive(name, arriving.whole)
            elif self.mode == "layer-major":
                self._advance(name)

    def wants_survey(self, name: str) -> bool:
        """In `fused` mode a method may apply rows that it has seen before, and need no whole."""
        method = self.slots[name].method
        return self.mode == "fused" and self._held_only is None and method.needs.survey

    @torch.no_grad()
    def survey_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Look at these rows, all of which come before the first is received."""
        slot = self.slots[name]
        assert isinstance(slot.method, Surveying)
        arriving = slot.arriving = slot.arriving or Arriving()
        with phase("update"):
            arriving.survey = slot.method.survey(rows, arriving.survey)

    def expect(self, left: int) -> None:
        """In layer-major mode: `left` more gradients of the same weight follow the next one.

        With the last of them the weight's sum is complete, and applied at once.
        """
        self.left = left

    def _advance(self, name: str) -> None:
        """Apply a sum that is complete; before the last gradient its state is sent for."""
        if self.left == 0:
            self.apply(name)
        elif self.left == 1 and self._host is not None:
            with phase("update"):
                self._host.call(name, self.slots[name].state)

    def prepare(self, slot: Slot, change: Callable[[], None], name: str = "refresh") -> None:
        """Change the state before the step, unless a repeated update has done so already."""
        if slot.prepared != self.updates:
            with phase(name), self.writing():
                change()
            slot.prepared = self.updates

    @contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """Inside, gradients of these weights are summed in `Slot.kept`; all others are dropped.

        For passes that are no update (`curvature.py`); who begins one takes the sums out again.
        """
        self._held_only = names
        try:
            yield
        finally:
            self._held_only = None

    def _hold(self, name: str, piece: Tensor) -> None:
        """Keep a micro-batch's gradient or projection, or add it to what is kept."""
        slot = self.slots[name]
        if slot.kept is None and self._is_tensor(piece.shape):  # nothing to add it to
            slot.kept = piece.to(self._dtype(piece)).contiguous()
        else:
            self._add(name, piece, 0, piece.shape)

    def _add(self, name: str, rows: Tensor, start: int, shape: torch.Size) -> None:
        """Add rows start, start + 1, ... of a micro-batch to a sum of that shape."""
        slot = self.slots[name]
        if slot.kept is None:
            slot.kept, slot.summed = self._zeros(name, shape, rows), 0
        if isinstance(slot.kept, Tensor):
            slot.kept[start : start + len(rows)].add_(rows)
            return
        seed = seed_of(self.seed, f"sum/{name}/{slot.summed}", self.updates)
        slot.kept.add(rows, start * (shape.numel() // shape[0]), seed)
        slot.summed += start + len(rows) == shape[0]

    def _zeros(self, name: str, shape: torch.Size, like: Tensor) -> Held:
        if self._is_tensor(shape):
            return like.new_zeros(shape, dtype=self._dtype(like))
        return empty_sum(self.sums, shape, like.device, self.staging, name)

    def _is_tensor(self, shape: torch.Size) -> bool:
        """Is what is kept a tensor? Estimates of the curvature and single gradients always are."""
        only = self._micro_batches == 1 or self._held_only is not None
        return only or is_tensor(self.sums, shape)

    def _dtype(self, piece: Tensor) -> torch.dtype:
        return torch.float32 if self._micro_batches > 1 else piece.dtype

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Global norm of what is kept, before clipping; where nothing is, of the whole gradient."""
        if self.mode == "layer-major":
            self._squares = [self._square_of[n] for n in self.slots if n in self._square_of]
        elif self.mode != "fused":
            kept = [slot.kept for slot in self.slots.values() if slot.kept is not None]
            self._squares = [square(piece) for piece in kept]
        return torch.stack(self._squares).sum().sqrt()

    @property
    def norm_of(self) -> str:
        """What `norm` measures.

        "gradient": of the whole update, the sum of its micro-batches as it is kept. "gradient,
        afterwards": the same, known when the weights have moved. "projections": what is kept of
        it. "gradient and projections": whole gradients of some weights, projections of others.
        """
        if self.mode in MOVE_EARLY:
            return "gradient, afterwards"
        whole = {slot.method.needs.full_gradient for slot in self.slots.values()}
        if self.mode == "unfused" or whole == {True}:
            return "gradient"
        return "projections" if whole == {False} else "gradient and projections"

    def clip(self, norm: Tensor, max_norm: float) -> None:
        """Scale this update so that its norm is at most max_norm. No host synchronisation."""
        if self.mode in MOVE_EARLY:
            raise ValueError(f"{self.mode} updates cannot be clipped: weights have already changed")
        self._coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)

    @torch.no_grad()
    def apply(self, name: str) -> None:
        """Turn what is kept into a step of this weight."""
        slot = self.slots[name]
        kept, slot.kept = slot.kept, None
        assert kept is not None, f"{name} has received no gradient"
        self.moved = True
        with phase("update"), self.state_here(name), self.writing():
            if not isinstance(kept, Tensor):
                if slot.goes_by_rows:
                    self._apply_sum_by_rows(name, kept)
                    return
                kept = kept.whole()
            if self._coefficient is not None:
                kept.mul_(self._coefficient)
            if self.mode == "layer-major":
                self._square_of[name] = square(kept)
            if self.mode in _WHOLE:
                with phase("refresh"):
                    slot.method.refresh(kept, slot.state)
                kept = slot.method.compress(kept, slot.state)
            step = slot.method.update(kept, slot.state)
            if step is not None:
                self._write(name, slot.weight, step)

    def _apply_sum_by_rows(self, name: str, kept: Sum) -> None:
        """Make floats of no more rows at a time than are written at a time."""
        slot = self.slots[name]
        slot.arriving = Arriving()
        width = kept.shape.numel() // kept.shape[0]
        for start, stop in row_bounds(slot.weight):
            rows = kept.values(start * width, stop * width).view(-1, *kept.shape[1:])
            if self._coefficient is not None:
                rows.mul_(self._coefficient)
            self.apply_rows(name, start, rows)
        slot.arriving = None

    def state_here(self, name: str) -> AbstractContextManager[None]:
        """Inside, the state of this weight is on the device."""
        host = self._host
        return nullcontext() if host is None else host.here(name, self.slots[name].state)

    @torch.no_grad()
    def apply_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Turn these rows of the gradient into a step of these rows of the weight."""
        slot = self.slots[name]
        assert slot.arriving is not None
        self.moved = True
        with phase("update"), self.writing():
            if start == 0:
                slot.arriving.update = self._row_update(slot, slot.arriving.survey, rows)
            update = slot.arriving.update
            if update is not None:
                weight = rows_of(slot.weight, start, start + len(rows))
                self._write(name, weight, update(rows.contiguous(), start), start)

    def _row_update(self, slot: Slot, survey: Tensor | None, rows: Tensor) -> RowUpdate | None:
        if survey is not None:
            assert isinstance(slot.method, Surveying)
            return slot.method.surveyed_update(survey, slot.weight.shape, slot.state)
        assert isinstance(slot.method, ByRows)
        return slot.method.row_update(rows, slot.state)

    def _write(self, name: str, weight: Weight, step: Step, first_row: int = 0) -> None:
        slot = self.slots[name]
        write(
            weight,
            step,
            lr=self.lr,
            weight_decay=slot.weight_decay,
            decay_first=slot.method.needs.decay_first,
            seed=seed_of(self.seed, f"round/{name}", self.updates),
            first_row=first_row,
        )

    def step(self) -> None:
        """Apply everything that is kept and has not been applied."""
        for name, slot in self.slots.items():
            if slot.kept is not None:
                self.apply(name)
        self.moved = False

    def discard(self) -> None:
        """Drop what is kept, so that this update makes no step.

        Weights and moments are as before it, but in modes that move early. A subspace that was
        chosen from the first micro-batch is chosen again in the next update, for no counter has
        moved.
        """
        for slot in self.slots.values():
            slot.kept = None
        self.moved = False

    def rewind(self, updates: int) -> None:
        """Back to so many updates, to before `begin`: nothing has moved, and it comes again.

        What was prepared stays so: the first micro-batch would only give the same again.
        """
        assert not self.moved, "weights that have moved do not come back"
        self.discard()
        self.updates = updates

    def prepared(self) -> list[str]:
        """The weights whose states are already prepared for the update that comes next."""
        return [name for name, slot in self.slots.items() if slot.prepared > self.updates]

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """("<parameter>/<state key>", tensor) of everything that varies, where it lives."""
        if self._host is not None:
            self._host.transfers.wait()
        for name, slot in self.slots.items():
            for key, value in slot.state.items():
                if isinstance(value, Tensor):
                    yield f"{name}/{key}", value

    def state_numbers(self) -> dict[str, dict[str, int | float]]:
        """The numbers of every parameter's state."""
        return {
            name: {k: v for k, v in slot.state.items() if not isinstance(v, Tensor)}
            for name, slot in self.slots.items()
        }
