"""A saved optimizer state, made into one of other settings: format, rank or method.

    convert(optimizer, written, tensors, numbers, updates)  ->  [Change, ...]

What becomes of the state of one weight:

    kept        the same values, bit for bit or in a wider format
    rounded     the same values, rounded once to the nearest of a narrower format
    cut         a smaller rank: the basis vectors that carry most of the gradient stay
    extended    a larger rank: the basis gets further vectors
    anew        the state means nothing to the new method, which starts as at update 0

Basis and moments of a subspace are carried over together or not at all, for a moment has no meaning
in another subspace. That is why random projections, which are drawn for one rank, begin anew.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem.errors import CheckpointError
from lowmem.kernels.random_normal import normal
from lowmem.kernels.slices import flat_slices
from lowmem.naming import seed_of
from lowmem.optim.formats import BFloat16, Blockwise8, Float32, State, number, tensor
from lowmem.optim.method import Method, Projected, Reallocating
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.orthonormal import RandomVectors
from lowmem.optim.projectors import SVD
from lowmem.optim.restore import Numbers, matched, missing_state
from lowmem.optim.rules import Adam, Lion, Sgd
from lowmem.optim.slots import Slot
from lowmem.optim.weights import like

How = Literal["kept", "rounded", "cut", "extended", "anew"]

MOMENTS = ("exp_avg", "exp_avg_sq")  # of the rules below, in the shape of the projected gradient
_MOVABLE_RULES = (Adam, Lion, Sgd)
_FORMATS = (Float32, BFloat16, Blockwise8)
_STEP_ONLY = ("eps", "bias", "betas", "multiplier", "decay_first")  # a state means the same
_GIVEN = ("right", "side", "rank", "whole", "refresh_offset")  # numbers that settings determine


@dataclass
class Change:
    """What became of the states of some weights. elements: of these weights.

    errors: per state tensor the sums of squares of (difference, value before); where a rank was
    cut, of the first moment mapped back to full size.
    """

    how: How
    weights: int = 0
    elements: int = 0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest relative error of a state tensor, in the norm over all these weights."""
        return max((math.sqrt(off / of) for off, of in self.errors.values() if of), default=0.0)

    def note(self, key: str, off: Tensor, of: Tensor) -> None:
        """Add squares of a difference and of what was there; 0-dim."""
        if not off.is_meta:
            before = self.errors.get(key, (0.0, 0.0))
            self.errors[key] = before[0] + off.item(), before[1] + of.item()

    def join(self, other: "Change") -> None:
        """Add the change of further weights."""
        self.weights += other.weights
        self.elements += other.elements
        for key, (off, of) in other.errors.items():
            before = self.errors.get(key, (0.0, 0.0))
            self.errors[key] = before[0] + off, before[1] + of


@torch.no_grad()
def convert(
    optimizer: Optimizer,
    written: Optimizer,
    tensors: Iterable[tuple[str, Tensor]],
    numbers: Mapping[str, Numbers],
    updates: int,
) -> list[Change]:
    """Put what `written` has saved into `optimizer`, whose state is as `add` left it.

    written: with the settings of the saved state, on the meta device. tensors: as
    `Optimizer.state_tensors` gives them. With both optimizers and the tensors on the meta device
    this only tells what would happen. CheckpointError: the state is not one of `written`, or a
    method of another package cannot take it over.
    """
    changes: dict[How, Change] = {}
    device = optimizer.device
    for name, saved in _by_weight(written, tensors, numbers):
        slot = optimizer.slots[name]
        here = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved.items()}
        with optimizer.state_here(name):
            change = _taken_over(name, written.slots[name].method, here, slot)
        changes.setdefault(change.how, Change(change.how)).join(change)
    optimizer.updates = updates
    return list(changes.values())


def _by_weight(
    written: Optimizer, tensors: Iterable[tuple[str, Tensor]], numbers: Mapping[str, Numbers]
) -> Iterator[tuple[str, State]]:
    """(weight, its saved state), each as soon as it is complete. CheckpointError: as `convert`."""
    own = written.state_numbers()
    for name, slot in written.slots.items():
        if set(numbers.get(name, ())) != set(own[name]):
            raise missing_state(f"the counters of {name}")
        if isinstance(slot.method, Reallocating):
            slot.method.reallocate(like(slot.weight), slot.state, numbers[name])
    if set(numbers) != set(written.slots):
        raise missing_state("the counters of " + next(iter(set(numbers) ^ set(written.slots))))
    expected = dict(written.state_tensors())
    left = {name: sum(key.startswith(f"{name}/") for key in expected) for name in written.slots}
    states: dict[str, State] = {name: dict(numbers[name]) for name in written.slots}
    for name in [name for name, count in left.items() if not count]:
        yield name, states.pop(name)
    for key, value, _ in matched(tensors, expected):
        name, _, own_key = key.partition("/")
        states[name][own_key] = value
        left[name] -= 1
        if not left[name]:
            yield name, states.pop(name)


def _taken_over(name: str, old: Method, saved: State, slot: Slot) -> Change:
    """Fill the slot's state as far as `saved` means something to its method."""
    change = Change("kept", 1, slot.weight.numel())
    if _meaning(old) == _meaning(slot.method):
        if isinstance(slot.method, Reallocating):
            numbers = {k: v for k, v in saved.items() if not isinstance(v, Tensor)}
            slot.method.reallocate(like(slot.weight), slot.state, numbers)
        if _shapes(saved) == _shapes(slot.state):
            for key in _shapes(saved):
                _move(saved, slot, key, change)
            _take_numbers(saved, slot.state)
            return change
    if _share_subspace(old, saved, slot):
        _take_subspace(old, saved, slot, change)
        return change
    for method in (old, slot.method):
        if not type(method).__module__.startswith("lowmem."):
            raise _unknown_method(name, method)
    change.how = "anew"
    return change


def _meaning(part: Any) -> Any:
    """What two methods must have in common for their states to mean the same; comparable."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    return type(part), {
        key: _meaning(value)
        for key, value in values.items()
        if key not in _STEP_ONLY and not isinstance(value, _FORMATS)
    }


def _shapes(state: State) -> dict[str, torch.Size]:
    """Shape by key, of tensors in 8-bit codes too, which have one key then."""
    shapes = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        if not isinstance(value, Tensor) or (last == "absmax" and f"{stem}.codes" in state):
            continue
        coded = last == "codes" and f"{stem}.absmax" in state
        shapes[stem if coded else key] = value.shape
    return shapes


def _value(state: State, key: str) -> Tensor:
    """A state tensor of any format: itself, or what its codes stand for, float32."""
    if key in state:
        return tensor(state, key)
    codes = tensor(state, f"{key}.codes")
    values = torch.empty(codes.shape, device=codes.device)
    for piece in flat_slices(codes):
        values.view(-1)[piece] = Blockwise8().load(state, key, piece)
    return values


def _move(saved: State, slot: Slot, key: str, change: Change) -> None:
    """Give one state tensor its saved values, in its own format."""
    ending = "" if key in saved else ".codes"
    mine = slot.state.get(key + ending)
    if isinstance(mine, Tensor) and mine.dtype == tensor(saved, key + ending).dtype:
        for part in [key] if not ending else [f"{key}.codes", f"{key}.absmax"]:
            tensor(slot.state, part).copy_(tensor(saved, part))
    else:
        _put(_value(saved, key), slot, key, change)


def _put(value: Tensor, slot: Slot, key: str, change: Change) -> None:
    """Write values into a state tensor, rounded to the nearest, and note by how much."""
    if key in slot.state:
        mine = tensor(slot.state, key)
        mine.copy_(value)
        narrower = mine.element_size() < value.element_size()
    else:
        format = Blockwise8(floor_codes=_floors_codes(slot.method))
        for piece in flat_slices(value):
            format.store(slot.state, key, piece, value.reshape(-1)[piece].float())
        narrower = True
    if not narrower:
        return
    if change.how == "kept":
        change.how = "rounded"
    off = value.new_zeros((), dtype=torch.float64)
    of, written = off.clone(), _value(slot.state, key).view(-1)
    for piece in flat_slices(value):
        before = value.reshape(-1)[piece].float()
        off += (written[piece].float() - before).square().sum(dtype=torch.float64)
        of += before.square().sum(dtype=torch.float64)
    change.note(key, off, of)


def _floors_codes(part: Any) -> bool:
    """Does the 8-bit format of this method keep a positive second moment from being zero?"""
    if isinstance(part, Blockwise8):
        return part.floor_codes
    inner = [getattr(part, each.name) for each in fields(part)] if is_dataclass(part) else []
    return all(_floors_codes(value) for value in inner)


def _take_numbers(saved: State, state: State) -> None:
    """Counters go on; what the settings determine stays as `init` found it."""
    for key, value in saved.items():
        if key in state and not isinstance(value, Tensor) and key not in _GIVEN:
            state[key] = value


def _share_subspace(old: Method, saved: State, slot: Slot) -> bool:
    """Have both a stored orthonormal basis on the same side, and moments of one meaning in it?"""
    new = slot.method
    if type(old) is not Projected or type(new) is not Projected:
        return False
    bases, rules = (old.projector, new.projector), (old.rule, new.rule)
    if not all(isinstance(projector, SVD) for projector in bases):
        return False
    if len({isinstance(projector, RandomVectors) for projector in bases}) == 2:
        return False
    if not isinstance(old.rule, _MOVABLE_RULES) or _meaning(rules[0]) != _meaning(rules[1]):
        return False
    if saved["right"] != slot.state["right"] or not number(saved, "step"):
        return False
    ranks = [_rank_axis(state)[1] for state in (saved, slot.state) if MOMENTS[0] in _shapes(state)]
    return len(ranks) == 2 and 0 not in ranks


def _rank_axis(state: State) -> tuple[int, int]:
    """(axis of the basis vectors in the moments, their number)."""
    axis = int(bool(state["right"]))
    low = next(shape for key, shape in _shapes(state).items() if key in MOMENTS)
    return axis, low[axis]


def _take_subspace(old: Method, saved: State, slot: Slot, change: Change) -> None:
    """Basis and moments of another rank, format or method, and what else means the same."""
    new, state = slot.method, slot.state
    assert isinstance(old, Projected)
    assert isinstance(new, Projected)
    axis, rank = _rank_axis(state)
    before = _rank_axis(saved)[1]
    basis = old.projector.basis(saved).float()
    kept = _leading(saved, axis, min(rank, before))
    if rank > before:
        change.how = "extended"
        basis = extended(basis, rank, seed_of(number(saved, "seed"), "extended"))
    elif rank < before:
        change.how = "cut"
        basis = basis[:, kept].contiguous()
    _store_basis(new.projector, basis, state)
    for key in MOMENTS:
        if key in _shapes(state):
            moment = _value(saved, key)
            low = moment.index_select(axis, kept)
            if key == "exp_avg" and rank < before:
                of = moment.square().sum(dtype=torch.float64)
                change.note(key, of - low.square().sum(dtype=torch.float64), of)
            _put(_with_directions(low, key, axis, rank), slot, key, change)
    for key, shape in _shapes(state).items():
        done = key in MOMENTS or key.startswith(("basis", "first"))
        own = key == "limiter_norm" and type(old.lift) is not type(new.lift)
        if not done and not own and _shapes(saved).get(key) == shape:
            _move(saved, slot, key, change)
    _take_numbers(saved, state)


def _store_basis(projector: Any, basis: Tensor, state: State) -> None:
    assert isinstance(projector, SVD)
    projector.store(state, basis, torch.ones((), dtype=torch.bool, device=basis.device))


def _leading(state: State, axis: int, count: int) -> Tensor:
    """The directions, in their order, that carry most of the gradient; (count,).

    By the second moment, the running mean of the squared gradient in each direction, or the first
    where there is no other. Of exact singular vectors these are the leading ones as of now, not as
    of the last refresh; those of `iteration` are in no reliable order. Directions are only chosen,
    never mixed: what is kept of both moments is exact.
    """
    key = "exp_avg_sq" if "exp_avg_sq" in _shapes(state) else "exp_avg"
    moment = _value(state, key)
    energy = (moment if key == "exp_avg_sq" else moment.square()).float().sum(dim=1 - axis)
    return energy.argsort(descending=True, stable=True)[:count].sort().values


def extended(basis: Tensor, rank: int, seed: int) -> Tensor:
    """`basis` (s, r), and further orthonormal columns to (s, rank), drawn at random."""
    side, before = basis.shape
    drawn = normal(side * (rank - before), seed, device=basis.device).view(side, -1)
    vectors = torch.linalg.qr(torch.cat([basis, drawn], dim=1).double()).Q
    return torch.cat([basis, vectors[:, before:].to(basis.dtype)], dim=1)


def _with_directions(low: Tensor, key: str, axis: int, rank: int) -> Tensor:
    """A moment with further directions on its rank axis.

    The first moment is zero there: mapped back, it is what it was. The second is that of the
    weakest direction, which the new ones come next to. Zero would need a bias correction of its
    own: with that of the old directions the first steps would be up to 6.6 times too long.
    """
    missing = rank - low.shape[axis]
    if not missing:
        return low
    weakest = low.float().sum(dim=1 - axis).argmin().view(1)
    shape = [-1, -1]
    shape[axis] = missing
    new = low.index_select(axis, weakest).expand(shape)
    return torch.cat([low, new if key == "exp_avg_sq" else torch.zeros_like(new)], dim=axis)


def _unknown_method(name: str, method: Method) -> CheckpointError:
    kind = type(method)
    return CheckpointError(
        f"the state of {name} cannot be converted: {kind.__qualname__} of {kind.__module__}",
        "lowmem does not know what the states of another package's method mean",
        "resume with the method, rank and states that the run has",
    )
