"""Estimates of the Hessian's diagonal, made in extra passes over the micro-batches of an update.

    gauss-newton   targets drawn from the model's own predictions; their mean gradient g over the
                   B tokens of the update gives B g^2. Its expectation is the diagonal of the
                   Gauss-Newton matrix of the mean loss. One pass.
    hutchinson     z (H z) with random signs z; its expectation is the diagonal of the Hessian.
                   H z = (g(w + e z) - g(w - e z)) / 2e in two passes, for our backward has no
                   derivative of its own.

The passes come before the update's own, while no gradient is held: the peak is no sum of both.

Central differences err by e^2/6 times the third derivative along z, and by the rounding of the two
gradients over e. At e = a thousandth of the weights' RMS the two meet: 5e-5 to 2e-4 of H z for
float32 models of two to four blocks, 1e-2 at ten times that e, 1e-3 at a tenth. The estimate itself
scatters by its own size. Weights in bfloat16 cannot be moved by e, and products in TF32 (off unless
asked for) would be all noise.

Source: Liu et al., arXiv:2305.14342, Algorithm 2; Yao et al., arXiv:2006.00719, equation 8.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowmem.errors import ConfigError
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.rounding import hashed_bits
from lowmem.kernels.slices import flat_slices
from lowmem.naming import seed_of
from lowmem.optim.formats import State, number
from lowmem.optim.method import Curvature, Dense, Needs
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.rules import Rule
from lowmem.phases import phase

RELATIVE_STEP = 1e-3  # of the RMS of all weights that are moved
_SMALLEST_RMS = 1e-3  # taken for weights that are nearly all zero

MicroBatches = Iterable[tuple[Tensor, Tensor]]
"""(inputs, targets), each (b, t) int64 on the model's device."""

Estimate = Iterator[tuple[slice, Tensor]]
"""(place in the flattened weight, float32 elements there, which may be overwritten); places begin
at multiples of 256."""


class LossModel(Protocol):
    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        """Sum of token losses / total_tokens, so that micro-batches add up to the mean."""


@runtime_checkable
class DrawingModel(Protocol):
    def drawn_loss(self, inputs: Tensor, targets: Tensor, total_tokens: int, seed: int) -> Tensor:
        """The same for targets that are drawn from the model's own predictions."""


class CurvedRule(Rule, Protocol):
    def curve(self, estimate: Estimate, state: State) -> None:
        """Take a new estimate of the Hessian's diagonal into the state."""


@dataclass(frozen=True)
class Curved(Dense):
    """A rule that also follows the Hessian's diagonal, estimated before every `gap`-th update.

    Where nobody makes estimates (gradients handed to the optimizer without `gather`) the rule
    never sees one, and must do without.
    """

    rule: CurvedRule
    curvature: Curvature = "gauss-newton"
    gap: int = 10

    @property
    def needs(self) -> Needs:
        return Needs(True, self.decay_first, self.curvature)

    def due(self, state: State) -> bool:
        """Before the first update, and every `gap` updates."""
        return number(state, "step") % self.gap == 0


def weights_due(optimizer: Optimizer) -> dict[str, Curved]:
    """The weights that get an estimate in this update, with their methods."""
    return {
        name: slot.method
        for name, slot in optimizer.slots.items()
        if isinstance(slot.method, Curved)
        and slot.method.due(slot.state)
        and slot.prepared != optimizer.updates  # by an update that is now repeated
    }


def estimate_curvature(
    model: LossModel, optimizer: Optimizer, micro_batches: MicroBatches, tokens: int
) -> None:
    """Make the estimates that are due and hand them over. The weights are as they were afterwards.

    tokens: targets of the whole update. ConfigError: weights that cannot be moved a little.
    """
    if optimizer.mode != "unfused":
        raise ValueError(f"curvature needs whole gradients, which {optimizer.mode} does not hold")
    due = weights_due(optimizer)
    with phase("curvature"):
        drawing = [name for name, method in due.items() if method.curvature == "gauss-newton"]
        if drawing:
            _gauss_newton(model, optimizer, drawing, micro_batches, tokens)
        moving = [name for name, method in due.items() if method.curvature == "hutchinson"]
        if moving:
            _hutchinson(model, optimizer, moving, micro_batches, tokens)


def _gauss_newton(
    model: LossModel,
    optimizer: Optimizer,
    names: list[str],
    micro_batches: MicroBatches,
    tokens: int,
) -> None:
    if not isinstance(model, DrawingModel):
        raise TypeError(f"{type(model).__name__} has no drawn_loss, which curvature needs")
    with optimizer.holding(names):
        for index, (inputs, targets) in enumerate(micro_batches):
            seed = seed_of(optimizer.seed, f"targets/{index}", optimizer.updates)
            model.drawn_loss(inputs, targets, tokens, seed).backward()
    for name in names:
        _hand(optimizer, name, lambda piece, at: piece.square_().mul_(tokens))


def _hutchinson(
    model: LossModel,
    optimizer: Optimizer,
    names: list[str],
    micro_batches: MicroBatches,
    tokens: int,
) -> None:
    weights = {name: optimizer.slots[name].weight for name in names}
    _require_movable(weights)
    seeds = {name: seed_of(optimizer.seed, f"signs/{name}", optimizer.updates) for name in names}
    with phase("update"), torch.no_grad():
        distance = _root_mean_square(weights.values()).mul_(RELATIVE_STEP)
        saved = {name: weight.clone() for name, weight in weights.items()}
    try:
        with optimizer.holding(names):
            for direction in (-1, 1):
                for name, weight in weights.items():
                    _move(weight, saved[name], distance * direction, seeds[name])
                for inputs, targets in micro_batches:
                    model.loss(inputs, targets, tokens).backward()
                if direction == -1:
                    _negate(optimizer, names)  # and the other side is added to it
    finally:
        for name, weight in weights.items():
            weight.copy_(saved.pop(name))
    for name in names:
        _hand(optimizer, name, partial(_diagonal, seed=seeds[name], distance=distance))


def _require_movable(weights: Mapping[str, Tensor | GroupedWeight]) -> None:
    for name, weight in weights.items():
        dtype = weight.dtype if isinstance(weight, Tensor) else "8-bit codes"
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{name} is stored as {dtype}, which no Hessian can be measured on",
                "the gradient is taken at w + e and w - e, and these round to w itself",
                "--weights fp32, or a method that does not measure the Hessian (sophia)",
            )


def _root_mean_square(weights: Iterable[Tensor]) -> Tensor:
    """Of all elements together, 0-dim float32; not zero."""
    found = [(torch.linalg.vector_norm(w, dtype=torch.float32), w.numel()) for w in weights]
    squares = torch.stack([norm.square() for norm, _ in found]).sum()
    return squares.div_(sum(count for _, count in found)).sqrt_().clamp_(min=_SMALLEST_RMS)


def _negate(optimizer: Optimizer, names: list[str]) -> None:
    for name in names:
        kept = optimizer.slots[name].kept
        if isinstance(kept, Tensor):
            kept.neg_()


def _move(weight: Tensor, saved: Tensor, distance: Tensor, seed: int) -> None:
    """weight <- saved + distance * signs."""
    for at in flat_slices(weight):
        target = weight.view(-1)[at]
        torch.add(saved.view(-1)[at], _signs(target, at, seed).mul_(distance), out=target)


def _signs(like: Tensor, at: slice, seed: int) -> Tensor:
    """+1 or -1 at random, by place in the weight: float32, of like's length."""
    bits = hashed_bits(like.numel(), seed, at.start, like.device)
    return bits.bitwise_and_(2).sub_(1).float()  # bit 1: 0 or 2


def _diagonal(difference: Tensor, at: slice, *, seed: int, distance: Tensor) -> Tensor:
    return difference.mul_(_signs(difference, at, seed)).div_(2 * distance)


def _hand(optimizer: Optimizer, name: str, finished: Callable[[Tensor, slice], Tensor]) -> None:
    """The held sum becomes the estimate of this weight, piece by piece."""
    slot = optimizer.slots[name]
    kept, slot.kept = slot.kept, None
    assert isinstance(kept, Tensor), "a weight has received no gradient"
    assert isinstance(slot.method, Curved)
    flat = kept.view(-1)
    estimate = (
        # What is not finite says nothing; it would stay in an average for ever.
        (at, finished(flat[at].float(), at).nan_to_num_(0.0, 0.0, 0.0))
        for at in flat_slices(flat)
    )
    with torch.no_grad():
        optimizer.prepare(slot, partial(slot.method.rule.curve, estimate, slot.state), "update")
