"""The two ends of the decoder as autograd sees them: token embedding, and final norm with the loss.

Both hand the gradient of their matrix over in row slices of the vocabulary, made one at a time
(`kernels/linear_cross_entropy.py`), so it never exists as a whole. Where embedding and head are one
matrix, its first slices are ready at the beginning of backward and nothing may be done with them
before the last blocks are through: there the head's gradient waits in `tied`, whole; the slices of
the embedding's are added to it, and the sum is handed over at once.

Either may be 8-bit codes: a lookup makes floats of its tokens' rows, a product of a slice's.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowmem.kernels.drawn_targets import drawn_targets
from lowmem.kernels.grouped_weight import Weight
from lowmem.kernels.linear_cross_entropy import cross_entropy, cross_entropy_backward, row_slices
from lowmem.kernels.rms_norm import rms_norm, rms_norm_backward
from lowmem.phases import phase

if TYPE_CHECKING:  # llama.py imports this file
    from lowmem.model.llama import Llama

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


class EmbeddingStep(torch.autograd.Function):
    """Rows of the embedding; `anchor` only makes the output require a gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, inputs: Tensor, model: "Llama", tied: list[Tensor]
    ) -> Tensor:
        ctx.inputs, ctx.model, ctx.tied = inputs.reshape(-1), model, tied
        return embedded(ctx.inputs, model.model.embed_tokens.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        model: Llama = ctx.model
        rows, padding = model.config.vocab_size, model.config.pad_token_id
        with phase("gradient of embedding"):
            # In bf16, one row after the other, a frequent token would lose most of its sum.
            exact = grad.float()
            for start, stop in row_slices(rows):
                made = embedding_rows(exact, ctx.inputs, start, stop, padding).to(grad.dtype)
                if ctx.tied:
                    ctx.tied[0][start:stop].add_(made)
                else:
                    model.hand_rows(EMBEDDING, start, made)
                del made  # before the next slice's are made
            del exact
            if ctx.tied:
                model.hand(EMBEDDING, ctx.tied.pop())
        return None, None, None, None


def embedded(inputs: Tensor, weight: Weight) -> Tensor:
    """The rows of these tokens, (n) -> (n, h); of codes, only they are made floats."""
    if isinstance(weight, Tensor):
        return functional.embedding(inputs, weight)
    return weight.picked(inputs)


def embedding_rows(
    grad: Tensor, inputs: Tensor, start: int, stop: int, padding: int | None
) -> Tensor:
    """Rows start to stop (excluded) of the embedding's gradient, (stop - start, h) like `grad`.

    grad: (n, h), summed by its tokens `inputs` (n); on the CPU in their order. Shapes do not depend
    on the tokens. The row of `padding` stays zero.
    """
    # Tokens of other slices are padding: its row, one behind the others, is left out of the sums.
    count = stop - start
    outside = (inputs < start).logical_or_(inputs >= stop)
    if padding is not None:
        outside.logical_or_(inputs == padding)
    index = (inputs - start).masked_fill_(outside, count)
    made = torch.ops.aten.embedding_dense_backward(grad, index, count + 1, count, False)
    return made[:count]


class LossStep(torch.autograd.Function):
    """Final norm, head and cross-entropy.

    seed: targets are drawn from the predictions instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        scale: float,
        model: "Llama",
        tied: list[Tensor],
        seed: int | None,
    ) -> Tensor:
        y, rstd = rms_norm(x, model.model.norm.weight, model.config.rms_norm_eps)
        if seed is not None:
            targets = drawn_targets(y, model.head_weight, targets, seed)
        loss, softmax = cross_entropy(
            y, model.head_weight, targets, scale, keep_logits=model.keep_logits
        )
        ctx.kept = x, rstd, y, targets, scale, softmax
        ctx.model, ctx.tied = model, tied
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        model: Llama = ctx.model
        x, rstd, y, targets, scale, softmax = ctx.kept
        del ctx.kept  # the loss keeps this node alive until after the last block
        weight = model.head_weight

        def take(start: int, rows: Tensor) -> None:
            rows.mul_(grad)
            if ctx.tied:
                ctx.tied[0][start : start + len(rows)] = rows
            else:
                model.hand_rows(HEAD, start, rows)

        with phase("gradient of head"):
            if model.config.tie_word_embeddings:
                ctx.tied.append(y.new_empty(weight.shape))
            grad_y = cross_entropy_backward(y, weight, targets, scale, softmax, take)
            del y, softmax
            grad_y = grad_y.mul_(grad).to(x.dtype)
        with phase("gradient of norm"):
            weight = model.model.norm.weight
            model.hand(NORM, rms_norm_backward(grad_y, x, weight, rstd))
        return grad_y, None, None, None, None, None
