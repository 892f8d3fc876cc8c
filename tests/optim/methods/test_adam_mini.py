"""Adam-mini: its blocks, and its formula in float64 for each of them."""

import math

import pytest
import torch

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.place import Place
from tests.optim.methods.trajectory import DECAY, LR, gradients, optimizer_of, run

BLOCKS = {  # role, shape -> rows of each block, with heads of 4 rows
    ("attention.q", (12, 5)): [4, 4, 4],
    ("attention.k", (8, 5)): [4, 4],
    ("attention.q", (10, 5)): [4, 4, 2],  # no whole number of heads
    ("attention.k", (3, 5)): [3],
    ("attention.v", (6, 5)): [1] * 6,
    ("attention.o", (6, 5)): [1] * 6,
    ("mlp.up", (6, 5)): [1] * 6,
    ("mlp.down", (1, 9)): [1],
    ("embedding", (7, 4)): [1] * 7,
    ("head", (7, 4)): [1] * 7,
    ("norm", (9,)): [9],
    ("bias", (9,)): [1] * 9,
}
every_block = pytest.mark.parametrize(("role", "shape"), BLOCKS)


@every_block
def test_it_follows_its_formula(role: str, shape: tuple[int, ...]) -> None:
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 10)
    method = build_method("adam_mini", {"betas": (0.9, 0.99), "eps": 1e-3}).of(role)
    found = run(method, start, grads, Place(role=role, head_dim=4))
    sizes = BLOCKS[role, shape]
    weight = start.double()
    m = torch.zeros_like(weight)
    v = [0.0] * len(sizes)
    for k, grad in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * grad.double()
        means = [rows.square().mean().item() for rows in grad.double().split(sizes)]
        v = [0.99 * old + 0.01 * new for old, new in zip(v, means, strict=True)]
        roots = [math.sqrt(block / (1 - 0.99**k)) + 1e-3 for block in v]
        moved = [rows / root for rows, root in zip(m.split(sizes), roots, strict=True)]
        weight = weight * (1 - LR * DECAY) - LR * torch.cat(moved) / (1 - 0.9**k)
    torch.testing.assert_close(found.double(), weight, atol=2e-6, rtol=0)  # 10 float32 updates


@every_block
def test_there_is_one_float32_second_moment_per_block(role: str, shape: tuple[int, ...]) -> None:
    """Whatever the format of the first moment: there are too few of them to be worth less."""
    method = build_method("adam_mini", {"states": "8bit", "min_8bit": 0}).of(role)
    optimizer = optimizer_of(method, torch.zeros(shape), Place(role=role, head_dim=4))
    second = tensor(optimizer.slots["weight"].state, "exp_avg_sq")
    assert (second.shape, second.dtype) == ((len(BLOCKS[role, shape]),), torch.float32)
