"""Head and cross-entropy in one: the logits exist for one slice at a time.

    l = x W',   loss = c sum_n (log sum exp l_n - l_n[target_n]),   c: a given scale
    G = c (softmax(l) - onehot),   dx = G W,   dW = G' x

Slices of tokens make everything in one pass over the logits, but dW is a sum over the slices.
Slices of the vocabulary make each part of dW once and in its place, but the softmax needs the sums
of all of them first, so the logits are made twice. Exponentials and sums are float32 whatever the
dtype of x and W.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.kernels.slices import pieces

SLICE_ELEMENTS = 2**24  # of logits that exist at a time, and of products on their way to dW
FEWEST_ROWS, MOST_ROWS = 256, 2048  # of W in a slice: fewer are slow, more only take memory
LARGE_WEIGHT = 2**25  # elements
IGNORED = -100  # a target that is no target

Made = tuple[Tensor, Tensor | None, Tensor | None]
Form = Callable[[Tensor, Tensor, Tensor, float, bool], Made]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, with_gradients: bool
) -> Made:
    """(loss, dx, dW): x (n, h), weight (V, h), targets (n) int64 of which -100 are skipped.

    loss: the scaled sum as a float32 scalar. dx, dW: None without gradients; in the dtype of x and
    W, though what is summed over slices in a lower dtype is summed in float32.
    """
    form = by_vocabulary if slices_vocabulary(weight) else by_tokens
    return form(x, weight, targets, scale, with_gradients)


def slices_vocabulary(weight: Tensor) -> bool:
    """Whether W is sliced instead of x: when it is large and of a low precision.

    There a float32 sum of dW and its cast, three times the bytes of W, would be the peak of the
    whole update. A smaller sum is not worth making the logits twice, and float32 needs no cast.
    """
    return weight.element_size() < 4 and weight.numel() > LARGE_WEIGHT


def by_tokens(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, with_gradients: bool
) -> Made:
    """One pass over slices of tokens."""
    rows = max(1, SLICE_ELEMENTS // weight.shape[0])
    several = len(x) > rows
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x) if with_gradients else None
    grad_weight = None
    for start, stop in pieces(len(x), rows, x.is_meta):
        part, wanted = x[start:stop], targets[start:stop]
        logits = _logits(part, weight)
        losses, total = _token_losses(logits, wanted)
        loss += losses.sum()
        if grad_x is not None:
            logits = _to_gradient(logits, total, wanted).to(part.dtype)  # from here their gradient
            present = (wanted != IGNORED).unsqueeze(1)
            grad_x[start:stop].addmm_(logits, weight, beta=0, alpha=scale).mul_(present)
            grad_weight = _accumulate(grad_weight, logits, part * present, scale, several)
        del logits  # before the next slice's are made
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return loss.mul_(scale), grad_x, grad_weight


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.t()).float()


def _token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss per token, zero where there is no target; sum of exponentials (n, 1)).

    Leaves exp(logit - largest logit) in `logits`.
    """
    logits.sub_(logits.amax(1, keepdim=True))
    picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1))
    total = logits.exp_().sum(1, keepdim=True)
    return total.log().sub_(picked).squeeze(1).masked_fill_(targets == IGNORED, 0), total


def _to_gradient(exponentials: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """softmax - onehot, in place; rows without a target are left for the caller to blank."""
    softmax = exponentials.div_(total)
    index = targets.clamp(min=0).unsqueeze(1)
    return softmax.scatter_(1, index, softmax.gather(1, index) - 1)


def _accumulate(
    total: Tensor | None, grad: Tensor, x: Tensor, scale: float, several: bool
) -> Tensor:
    """total + scale grad' x; of several slices the sum is float32."""
    if total is None:
        dtype = torch.float32 if several else x.dtype
        total = torch.zeros(grad.shape[1], x.shape[1], dtype=dtype, device=x.device)
    if total.dtype == x.dtype:
        return total.addmm_(grad.t(), x, alpha=scale)
    rows = max(1, SLICE_ELEMENTS // x.shape[1])
    for start, stop in pieces(len(total), rows, total.is_meta):
        total[start:stop].add_(grad[:, start:stop].t() @ x, alpha=scale)
    return total


def by_vocabulary(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, with_gradients: bool
) -> Made:
    """Two passes over slices of the vocabulary: the sums of exponentials, then the gradients."""
    rows = min(MOST_ROWS, max(FEWEST_ROWS, SLICE_ELEMENTS // max(1, len(x))))
    targets = targets.unsqueeze(1)
    ignored = targets == IGNORED
    log_total = x.new_full(targets.shape, -math.inf, dtype=torch.float32)
    # NaN until the slice with the target comes: one outside the vocabulary does not go unseen.
    picked = torch.full_like(log_total, math.nan)
    for start, stop in pieces(len(weight), rows, weight.is_meta):
        part = weight[start:stop]
        _add_to_totals(log_total, picked, _logits(x, part), targets - start)
    loss = picked.neg_().add_(log_total).masked_fill_(ignored, 0).sum().mul_(scale)
    if not with_gradients:
        return loss, None, None
    log_total.masked_fill_(ignored, math.inf)  # no target: softmax and gradient are zero
    # In bf16 every slice would round the sum: relative error 1.0e-2 instead of 1.8e-3 (125 slices).
    grad_x = torch.zeros_like(x, dtype=torch.float32)
    grad_weight = torch.empty_like(weight)
    for start, stop in pieces(len(weight), rows, weight.is_meta):
        part = weight[start:stop]
        grad = _softmax_less_onehot(_logits(x, part), log_total, targets - start).to(x.dtype)
        grad_weight[start:stop].addmm_(grad.t(), x, beta=0, alpha=scale)
        grad_x.add_(grad @ part, alpha=scale)
        del grad
    return loss, grad_x.to(x.dtype), grad_weight


def _add_to_totals(log_total: Tensor, picked: Tensor, logits: Tensor, wanted: Tensor) -> None:
    """Take a slice's logits into log_total and picked, all (n, 1) but `logits`, which is spoilt.

    wanted: the target's column in this slice, outside of it where the target is elsewhere.
    """
    column = wanted.clamp(0, logits.shape[1] - 1)
    picked.copy_(torch.where(column == wanted, logits.gather(1, column), picked))
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    torch.logaddexp(log_total, total.log_().add_(largest), out=log_total)


def _softmax_less_onehot(logits: Tensor, log_total: Tensor, wanted: Tensor) -> Tensor:
    """exp(logits - log_total) - onehot of a slice, in place."""
    softmax = logits.sub_(log_total).exp_()
    column = wanted.clamp(0, softmax.shape[1] - 1)
    hit = (column == wanted).to(softmax.dtype)
    return softmax.scatter_(1, column, softmax.gather(1, column).sub_(hit))
