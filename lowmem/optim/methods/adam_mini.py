"""Adam-mini: Adam with one second moment per block of the Hessian instead of one per element."""

import math
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.nn import functional

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import (
    Float32,
    Format,
    State,
    fill_zero,
    format_named,
    number,
    tensor,
)
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Direction, age


@dataclass(frozen=True)
class AdamMini:
    """Adam whose V is a mean over blocks of rows. For Dense: pieces must be whole rows.

    State: exp_avg of the weight's shape; exp_avg_sq, one float32 per block; block_rows.
    """

    betas: tuple[float, float]
    eps: float
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        rows = block_rows(like, place)
        blocks = -(-like.shape[0] // rows)
        state["block_rows"] = rows
        self.format.zeros(state, "exp_avg", like, signed=True)
        state["exp_avg_sq"] = torch.zeros(blocks, dtype=torch.float32, device=like.device)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        (first, second), k = self.betas, age(state)
        rows, in_block = gradient.shape[0], number(state, "block_rows")
        width = gradient.numel() // max(1, rows)
        exp_avg_sq = tensor(state, "exp_avg_sq").mul_(second)
        exp_avg_sq.add_(_block_means(gradient, in_block), alpha=1 - second)
        root = exp_avg_sq.sqrt().div_(math.sqrt(1 - second**k)).add_(self.eps)
        of_row = root.repeat_interleave(in_block, output_size=len(root) * in_block)

        def of(piece: Tensor, at: slice) -> Tensor:
            exp_avg = self.format.load(state, "exp_avg", at)
            exp_avg.mul_(first).add_(piece, alpha=1 - first)
            mine = of_row[at.start // width : at.stop // width]
            moved = exp_avg.view(-1, width) / mine[:, None]
            self.format.store(state, "exp_avg", at, exp_avg)
            return moved.view(-1)

        return Direction(of, 1 / (1 - first**k))

    def reset(self, state: State) -> None:
        fill_zero(state, "exp_avg", "exp_avg_sq")


def block_rows(like: Tensor, place: Place) -> int:
    """Rows that share a second moment: a head, a neuron or token, a whole norm, a bias' element."""
    if place.role in ("attention.q", "attention.k"):
        return min(place.head_dim, like.shape[0])
    return like.shape[0] if like.ndim == 1 and place.role != "bias" else 1


def _block_means(gradient: Tensor, in_block: int) -> Tensor:
    """Mean square of each block of `in_block` rows, the last one perhaps shorter; float32."""
    rows = gradient.shape[0]
    lines = gradient.view(rows, -1)
    squares = torch.linalg.vector_norm(lines, dim=1, dtype=torch.float32).square_()
    missing = -rows % in_block
    sums = functional.pad(squares, (0, missing)).view(-1, in_block).sum(dim=1)
    sums.div_(in_block * lines.shape[1])
    sums[-1] *= in_block / (in_block - missing)
    return sums


def adam_mini(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """Adam-mini: half of Adam's state, by one second moment per block.

        v_block <- b2 v_block + (1 - b2) mean(G_block^2);  M as Adam
        W <- (1 - lr wd) W - lr * M/(1 - b1^k) / (sqrt(v_block/(1 - b2^k)) + eps)

    Blocks: a head of query and key, a row (output neuron) of the other matrices, a token's row of
    embedding and head, a norm as a whole; biases are plain Adam. As released since 1.1. `states`
    is the format of M; the few second moments stay float32.

    Source: Zhang et al. 2024, arXiv:2406.16793, Algorithm 1 and 3. State: one moment of the
    weight's shape and a number per block.
    """
    method = Dense(AdamMini(betas, eps, format_named(states, min_8bit, floor_codes)))
    return ByRole(method, method)


SPEC = MethodSpec(
    adam_mini,
    {"1b": {"lr": 1e-3}, "7b": {"lr": 3e-4}},
    "as adamw: arXiv:2406.16793 recommends AdamW's own settings",
)
