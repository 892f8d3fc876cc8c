"""The gradients of one update: what both training and its rehearsal run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lowmem.optim.curvature import LossModel, MicroBatches, estimate_curvature, weights_due
from lowmem.optim.optimizer import Optimizer


@runtime_checkable
class LayerMajorModel(Protocol):
    def layer_major_loss(
        self, micro_batches: MicroBatches, total_tokens: int, count: int
    ) -> Tensor:
        """Mean loss of an update, of which every block's gradients are handed over in turn."""


@dataclass(frozen=True)
class MadeAnew(Iterable[tuple[Tensor, Tensor]]):
    """Micro-batches that are made each time they are read, so that only one is in memory."""

    make: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.make()


def gather(
    model: LossModel,
    optimizer: Optimizer,
    micro_batches: MicroBatches,
    *,
    count: int,
    tokens: int,
    lr: float,
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    """(mean loss per token, gradient norm before clipping), 0-dim, on the model's device.

    count: micro-batches; tokens: targets of the whole update. The gradients are in the optimizer,
    and `optimizer.step()` is next; in `fused` and layer-major mode the weights have already
    moved. Micro-batches are read more than once in layer-major order, and where a method is due an
    estimate of the curvature: a mere iterator is then copied to a list.
    """
    optimizer.begin(lr, count)
    if weights_due(optimizer):
        if isinstance(micro_batches, Iterator):
            micro_batches = list(micro_batches)
        estimate_curvature(model, optimizer, micro_batches, tokens)
    if optimizer.mode == "layer-major":
        return _layer_major(model, optimizer, micro_batches, count, tokens)
    total: Tensor | None = None
    for inputs, targets in micro_batches:
        loss = model.loss(inputs, targets, tokens)
        loss.backward()
        total = loss.detach() if total is None else total.add_(loss.detach())
        del loss  # so that every micro-batch finds the same memory
    assert total is not None, "an update needs a micro-batch"
    del inputs, targets  # else they lie beside what the norm makes
    norm = optimizer.norm()
    if clip is not None:
        optimizer.clip(norm, clip)
    return total, norm


def _layer_major(
    model: LossModel, optimizer: Optimizer, micro_batches: MicroBatches, count: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """The same in layer-major order; the weights have moved."""
    if not isinstance(model, LayerMajorModel):
        raise TypeError(f"{type(model).__name__} has no layer_major_loss")
    if isinstance(micro_batches, Iterator):
        micro_batches = list(micro_batches)
    return model.layer_major_loss(micro_batches, tokens, count), optimizer.norm()
