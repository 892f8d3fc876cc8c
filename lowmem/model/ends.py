"""The two ends of the decoder as autograd sees them: token embedding, and final norm with the loss.

Both hand the gradient of their matrix over in row slices of the vocabulary, made one at a time
(`kernels/linear_cross_entropy.py`), so it never exists as a whole. Where embedding and head are one
matrix, its first slices are ready at the beginning of backward and nothing may be done with them
before the last blocks are through: there the head's gradient waits in `tied`, whole; the slices of
the embedding's are added to it, and the sum is handed over at once.

Either may be 8-bit codes: a lookup makes floats of its tokens' rows, a product of a slice's.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowmem.kernels.drawn_targets import drawn_targets
from lowmem.kernels.grouped_weight import Weight
from lowmem.kernels.linear_cross_entropy import (
    Softmax,
    TakeRows,
    cross_entropy,
    cross_entropy_backward,
    row_slices,
)
from lowmem.kernels.rms_norm import rms_norm, rms_norm_backward
from lowmem.model.sink import SurveyingSink
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

        def take(start: int, rows: Tensor) -> None:
            if ctx.tied:
                ctx.tied[0][start : start + len(rows)].add_(rows)
            else:
                model.hand_rows(EMBEDDING, start, rows)

        with phase("gradient of embedding"):
            sink = model.sink
            if not ctx.tied and isinstance(sink, SurveyingSink) and sink.wants_survey(EMBEDDING):
                embedding_gradient(model, ctx.inputs, grad, partial(sink.survey_rows, EMBEDDING))
            embedding_gradient(model, ctx.inputs, grad, take)
            if ctx.tied:
                model.hand(EMBEDDING, ctx.tied.pop())
        return None, None, None, None


def embedding_gradient(model: "Llama", inputs: Tensor, grad: Tensor, take: TakeRows) -> None:
    """Make the embedding's gradient from `grad` (n, h), that of its output, for `take`.

    inputs: (n) tokens.
    """
    # In bf16, one row after the other, a frequent token would lose most of its sum.
    exact = grad.float()
    for start, stop in row_slices(model.config.vocab_size):
        made = embedding_rows(exact, inputs, start, stop, model.config.pad_token_id)
        made = made.to(grad.dtype)
        take(start, made)
        del made  # before the next slice's are made


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
        loss, ctx.kept = final_loss(model, x, targets, scale, seed)
        ctx.model, ctx.tied = model, tied
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        model: Llama = ctx.model
        kept = ctx.kept
        del ctx.kept  # the loss keeps this node alive until after the last block

        def take(start: int, rows: Tensor) -> None:
            rows.mul_(grad)
            if ctx.tied:
                ctx.tied[0][start : start + len(rows)] = rows
            else:
                model.hand_rows(HEAD, start, rows)

        with phase("gradient of head"):
            if model.config.tie_word_embeddings:
                ctx.tied.append(kept.y.new_empty(model.head_weight.shape))
            grad_y = head_gradient(model, kept, take)
            grad_y = grad_y.mul_(grad).to(kept.x.dtype)
        with phase("gradient of norm"):
            grad_x = norm_gradient(model, kept, grad_y)
        return grad_x, None, None, None, None, None


@dataclass
class KeptOfLoss:
    """What the backward of `final_loss` needs; `head_gradient` takes y and the softmax out."""

    x: Tensor
    rstd: Tensor
    targets: Tensor
    scale: float
    normed: list[tuple[Tensor, Softmax]]

    @property
    def y(self) -> Tensor:
        return self.normed[0][0]


def final_loss(
    model: "Llama", x: Tensor, targets: Tensor, scale: float, seed: int | None
) -> tuple[Tensor, KeptOfLoss]:
    """Scaled sum of the cross-entropies of x (n, h), the last block's output, and `targets` (n)."""
    y, rstd = rms_norm(x, model.model.norm.weight, model.config.rms_norm_eps)
    if seed is not None:
        targets = drawn_targets(y, model.head_weight, targets, seed)
    loss, softmax = cross_entropy(
        y, model.head_weight, targets, scale, keep_logits=model.keep_logits
    )
    return loss, KeptOfLoss(x, rstd, targets, scale, [(y, softmax)])


def head_gradient(model: "Llama", kept: KeptOfLoss, take: TakeRows) -> Tensor:
    """Gradient of the norm's output, float32 (n, h); the head's rows go to `take`."""
    y, softmax = kept.normed.pop()
    return cross_entropy_backward(y, model.head_weight, kept.targets, kept.scale, softmax, take)


def norm_gradient(model: "Llama", kept: KeptOfLoss, grad_y: Tensor) -> Tensor:
    """Gradient of x, in the memory of `grad_y`; the norm's is handed over."""
    weight = model.model.norm.weight
    model.hand(NORM, rms_norm_backward(grad_y, kept.x, weight, kept.rstd))
    return grad_y
