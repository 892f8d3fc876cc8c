"""Head and cross-entropy in one: the logits exist for one slice of tokens at a time.

    l = x W',   loss = c sum_n (log sum exp l_n - l_n[target_n]),   c: a given scale
    G = c (softmax(l) - onehot),   dx = G W,   dW = G' x

Gradients are made in the same pass, while the slice's logits are there, so nothing of size n x V is
kept for backward. Exponentials and sums are float32 whatever the dtype of x and W.
"""

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**24  # of logits that exist at a time, and of products on their way to dW
IGNORED = -100  # a target that is no target


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, with_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, dx, dW): x (n, h), weight (V, h), targets (n) int64 of which -100 are skipped.

    loss: the scaled sum as a float32 scalar. dx, dW: None without gradients; in the dtype of x and
    W, though several slices of a lower dtype are summed in float32.
    """
    rows = max(1, SLICE_ELEMENTS // weight.shape[0])
    parts = list(zip(x.split(rows), targets.split(rows), strict=True))
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x) if with_gradients else None
    grad_weight = None
    for index, (part, wanted) in enumerate(parts):
        logits = (part @ weight.t()).float()
        losses, total = _token_losses(logits, wanted)
        loss += losses.sum()
        if grad_x is not None:
            grad = _to_gradient(logits, total, wanted).to(part.dtype)
            del logits
            present = (wanted != IGNORED).unsqueeze(1)
            grad_x[index * rows : index * rows + len(part)].addmm_(
                grad, weight, beta=0, alpha=scale
            ).mul_(present)
            grad_weight = _accumulate(grad_weight, grad, part * present, scale, len(parts) > 1)
            del grad
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return loss.mul_(scale), grad_x, grad_weight


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
    for part, columns in zip(total.split(rows), grad.split(rows, dim=1), strict=True):
        part.add_(columns.t() @ x, alpha=scale)
    return total
