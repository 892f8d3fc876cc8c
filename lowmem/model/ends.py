"""The two ends of the decoder as autograd sees them: token embedding, and final norm with the loss.

The loss makes the head's gradient in its forward (`kernels/linear_cross_entropy.py`) and hands it
over when backward begins. Where embedding and head are one matrix that gradient waits in `tied`
until the embedding's is there, and the sum is handed over once.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowmem.kernels.drawn_targets import drawn_targets
from lowmem.kernels.linear_cross_entropy import linear_cross_entropy
from lowmem.kernels.rms_norm import rms_norm, rms_norm_backward
from lowmem.phases import phase

if TYPE_CHECKING:  # llama.py imports this file
    from lowmem.model.llama import Llama

EMBEDDING = "model.embed_tokens.weight"


class EmbeddingStep(torch.autograd.Function):
    """Rows of the embedding; `anchor` only makes the output require a gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, inputs: Tensor, model: "Llama", tied: list[Tensor]
    ) -> Tensor:
        ctx.inputs, ctx.model, ctx.tied = inputs.reshape(-1), model, tied
        return functional.embedding(ctx.inputs, model.model.embed_tokens.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        model: Llama = ctx.model
        with phase("gradient of embedding"):
            made = _embedding_gradient(grad, ctx.inputs, model)
            del grad
            if ctx.tied:
                made.add_(ctx.tied.pop())
            model.hand(EMBEDDING, made)
        return None, None, None, None


def _embedding_gradient(grad: Tensor, inputs: Tensor, model: "Llama") -> Tensor:
    """(V, h): sums of the rows of `grad` (n, h) by token; that of the padding token stays zero.

    Summed in float32: one row after the other in bf16, as the CPU and (up to 3,072 tokens) CUDA do
    it, a frequent token would lose most of its sum, and the result would depend on the micro-batch.
    """
    padding = model.config.pad_token_id
    wide = grad.float()
    made = torch.ops.aten.embedding_dense_backward(
        wide, inputs, model.config.vocab_size, -1 if padding is None else padding, False
    )
    return made.to(grad.dtype)


class LossStep(torch.autograd.Function):
    """Final norm, head and cross-entropy; both gradients are made in the forward.

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
        wanted = ctx.needs_input_grad[0]
        if seed is not None:
            targets = drawn_targets(y, model.head_weight, targets, seed)
        made = linear_cross_entropy(y, model.head_weight, targets, scale, wanted)
        ctx.made = (*made[1:], x, rstd)
        ctx.model, ctx.tied = model, tied
        return made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        model: Llama = ctx.model
        grad_y, grad_head, x, rstd = ctx.made
        del ctx.made  # the loss keeps this node alive until after the last block
        with phase("gradient of head"):
            grad_head.mul_(grad)
            if model.config.tie_word_embeddings:
                ctx.tied.append(grad_head)
            else:
                model.hand("lm_head.weight", grad_head)
            del grad_head
        with phase("gradient of norm"):
            grad_y.mul_(grad)
            weight = model.model.norm.weight
            model.hand("model.norm.weight", rms_norm_backward(grad_y, x, weight, rstd))
        return grad_y, None, None, None, None, None
