"""The gradients of one update: what both training and its rehearsal run."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from lowmem.optim.optimizer import Optimizer

MicroBatches = Iterable[tuple[Tensor, Tensor]]
"""(inputs, targets), each (b, t) int64 on the model's device."""


class LossModel(Protocol):
    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        """Sum of token losses / total_tokens, so that micro-batches add up to the mean."""


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
    and `optimizer.step()` is next; in `fused` mode the weights have already moved.
    """
    optimizer.begin(lr, count)
    total: Tensor | None = None
    for inputs, targets in micro_batches:
        loss = model.loss(inputs, targets, tokens)
        loss.backward()
        total = loss.detach() if total is None else total.add_(loss.detach())
        del loss  # so that every micro-batch finds the same memory
    assert total is not None, "an update needs a micro-batch"
    norm = optimizer.norm()
    if clip is not None:
        optimizer.clip(norm, clip)
    return total, norm
