"""Head and cross-entropy in one: logits and their gradient exist for one slice of W at a time.

    l = x W',   loss = c sum_n (log sum exp l_n - l_n[target_n]),   c: a given scale
    G = c (softmax(l) - onehot),   dx = G W,   dW = G' x

The softmax needs the sum over the whole vocabulary, so there are two passes over slices of W:

    loss, softmax = cross_entropy(x, weight, targets, scale)
    grad_x = cross_entropy_backward(x, weight, targets, scale, softmax, take)   # take(start, rows)

The second hands the rows of dW over as soon as they are there, so no dW is ever whole. It makes the
logits again, unless the first was told to keep them; the bits are the same. Exponentials and sums
are float32 whatever the dtype of x and W, in pieces of a slice's tokens.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.kernels.grouped_weight import Weight, float_rows
from lowmem.kernels.slices import divided, pieces, slice_elements
from lowmem.phases import phase

SLICE_ROWS = 4096
"""Of W in a slice, whatever the number of tokens, so that memory grows with it in a straight line.
A product of that many columns is as fast as a whole one; fewer rows would take less memory, but
add more roundings to dx. A multiple of 256: row slices then hold whole blocks of 8-bit moments,
and whole groups of codes."""

IGNORED = -100  # a target that is no target

TakeRows = Callable[[int, Tensor], None]
"""take(start, rows): the rows start, start + 1, ... of a gradient, which it may keep."""


@dataclass
class Softmax:
    """What the second pass needs of the first.

    log_total: (n, 1) float32, logarithm of the sum of exponentials; infinite without a target.
    logits: of each slice (n, rows) in x's dtype, if they were kept; the second pass takes them out.
    """

    log_total: Tensor
    logits: deque[Tensor] = field(default_factory=deque)


def cross_entropy(
    x: Tensor, weight: Weight, targets: Tensor, scale: float, *, keep_logits: bool = False
) -> tuple[Tensor, Softmax]:
    """(loss, softmax): x (n, h), weight (V, h), targets (n) int64 of which -100 are skipped.

    Of a weight in codes the rows of one slice are floats at a time.

    loss: the scaled sum as a float32 scalar; NaN where a target is outside the vocabulary.
    """
    targets = targets.unsqueeze(1)
    ignored = targets == IGNORED
    log_total = x.new_full(targets.shape, -math.inf, dtype=torch.float32)
    # NaN until the slice with the target comes: one outside the vocabulary does not go unseen.
    picked = torch.full_like(log_total, math.nan)
    softmax = Softmax(log_total)
    for start, stop in row_slices(weight.shape[0]):
        logits = x @ float_rows(weight, start, stop).t()
        for tokens in _token_pieces(logits):
            exact = logits[tokens].to(torch.float32, copy=keep_logits)
            _add_to_totals(log_total[tokens], picked[tokens], exact, targets[tokens] - start)
            del exact
        if keep_logits:
            softmax.logits.append(logits)
        del logits  # before the next slice's are made
    loss = picked.neg_().add_(log_total).masked_fill_(ignored, 0).sum().mul_(scale)
    log_total.masked_fill_(ignored, math.inf)  # softmax and gradient will be zero
    return loss, softmax


def cross_entropy_backward(
    x: Tensor, weight: Weight, targets: Tensor, scale: float, softmax: Softmax, take: TakeRows
) -> Tensor:
    """dx (n, h); the rows of dW go to `take`, slice by slice from the first to the last.

    Arguments as those of `cross_entropy`. `take` may change the rows of W that it is given the
    gradient of. dx: float32, for in bf16 every slice would round the sum once more: the relative
    error is 3.6e-3 instead of 2.3e-3 of 32000 rows, and 1.2e-2 instead of 2.0e-3 of 128256.
    """
    targets = targets.unsqueeze(1)
    with phase("loss"):
        grad_x = torch.zeros_like(x, dtype=torch.float32)
    for start, stop in row_slices(weight.shape[0]):
        part = float_rows(weight, start, stop)
        with phase("loss"):
            grad = softmax.logits.popleft() if softmax.logits else x @ part.t()
            _turn_into_gradient(grad, softmax.log_total, targets - start)
            if grad.dtype == grad_x.dtype:
                grad_x.addmm_(grad, part, alpha=scale)
            else:
                grad_x.add_(grad @ part, alpha=scale)
        del part  # floats of codes
        rows = x.new_empty(stop - start, x.shape[1]).addmm_(grad.t(), x, beta=0, alpha=scale)
        del grad
        take(start, rows)
        del rows
    return grad_x


def row_slices(rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of slices of a matrix with a row per token of the vocabulary."""
    # All of them, on meta too: kept logits add up, and every gradient row must arrive.
    return pieces(rows, divided(SLICE_ROWS), False)


def _token_pieces(logits: Tensor) -> Iterator[slice]:
    """Rows of which a float32 copy may exist."""
    rows = max(1, slice_elements(logits) // logits.shape[1])
    for start, stop in pieces(len(logits), rows, logits.is_meta):
        yield slice(start, stop)


def _add_to_totals(log_total: Tensor, picked: Tensor, logits: Tensor, wanted: Tensor) -> None:
    """Take a slice's logits into log_total and picked, all (n, 1) but `logits`, which is spoilt.

    wanted: the target's column in this slice, outside of it where the target is elsewhere.
    """
    column = wanted.clamp(0, logits.shape[1] - 1)
    picked.copy_(torch.where(column == wanted, logits.gather(1, column), picked))
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    torch.logaddexp(log_total, total.log_().add_(largest), out=log_total)


def _turn_into_gradient(logits: Tensor, log_total: Tensor, wanted: Tensor) -> None:
    """logits <- exp(logits - log_total) - onehot, in place; computed in float32."""
    for tokens in _token_pieces(logits):
        part = logits[tokens]
        softmax = part.float()
        softmax.sub_(log_total[tokens]).exp_()
        column = wanted[tokens].clamp(0, softmax.shape[1] - 1)
        hit = (column == wanted[tokens]).to(softmax.dtype)
        softmax.scatter_(1, column, softmax.gather(1, column).sub_(hit))
        if softmax.dtype != part.dtype:
            part.copy_(softmax)
        del part, softmax  # before the next piece's are made
