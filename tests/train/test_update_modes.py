"""The blocks of llama-60m on C4: every update mode makes the weights of `unfused`."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.presets import read_preset
from lowmem.config.schema import OptimizerConfig
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.methods import method_spec
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather

pytestmark = pytest.mark.slow

METHODS = (
    *("galore", "natural_galore", "q_galore", "apollo", "apollo_mini", "frugal", "fira", "cosmos"),
    *("adamw", "adam8bit"),
)
PROJECTED = {"galore": 1e-5, "natural_galore": 1e-4, "q_galore": 2e-3}
"""Methods whose projections `fused+subspace` adds up (of others it adds whole gradients), and how
far the weights may be apart, as a share of the way they went. Sums of P'g and P' times the sum of g
differ in the last bits of float32, and Adam divides by roots of second moments. Seen: 1.1e-6,
7.5e-6, and 2.5e-4, where moments are 8-bit codes, of which some become their neighbours.
"""
ROWS, SEQ_LEN = 4, 64


@dataclass
class Trained:
    losses: list[float]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    optimizer: Optimizer


def trained(
    corpus: Corpus, method: str, mode: Any, micro_batches: list[int], **how: Any
) -> Trained:
    """Updates of the same text, each in so many micro-batches; how: weights, and options."""
    weights = how.pop("weights")
    config = read_preset("llama-60m").model_copy(update={"vocab_size": corpus.vocab_size})
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = Llama(config, dtype=dtype, device="cpu", recompute="attn")
    model.initialise(0)
    takes = method_spec(method).arguments
    optimizer = build_optimizer(
        OptimizerConfig.model_validate(
            {"method": method} | {key: value for key, value in how.items() if key in takes}
        ),
        model.weights(),
        model.roles(),
        mode=mode,
        seed=0,
        head_dim=config.head_dim,
    )
    optimizer.attach(model)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    lr = method_spec(method).learning_rate(60_000_000)
    assert corpus.train is not None
    batches = Batches(corpus.train, seq_len=SEQ_LEN, rows_per_update=ROWS, seed=0)
    losses = []
    for update, count in enumerate(micro_batches):
        batch = batches.of(update)
        micro = list(batch.micro_batches(ROWS // count))
        loss, _ = gather(
            model, optimizer, micro, count=count, tokens=batch.tokens, lr=lr, clip=None
        )
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, start, model.state_dict(), optimizer)


def assert_same(one: Trained, other: Trained) -> None:
    """Losses, weights and states, bit for bit."""
    assert one.losses == other.losses
    states = dict(other.optimizer.state_tensors())
    for name, tensor in one.optimizer.state_tensors():
        assert torch.equal(tensor, states[name]), name
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def distance(one: Trained, other: Trained) -> float:
    """Between their weights, as a share of the way they went: the largest of any weight."""
    return max(
        float((other.weights[name] - weight).norm() / (weight - one.start[name]).norm())
        for name, weight in one.weights.items()
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_mode_makes_the_same_weights_of_one_micro_batch(
    method: str, tiny_corpus: Corpus
) -> None:
    """Bit for bit in bf16, its stochastic rounding and two choices of a subspace included."""
    how: dict[str, Any] = {"micro_batches": [1, 1, 1], "weights": "bf16", "rank": 128, "gap": 2}
    plain = trained(tiny_corpus, method, "unfused", **how)
    assert all(not torch.equal(plain.start[name], w) for name, w in plain.weights.items())
    for mode in ("fused", "fused+subspace", "layer-major"):
        assert_same(plain, trained(tiny_corpus, method, mode, **how))


@pytest.mark.parametrize("method", METHODS)
def test_accumulating_modes_make_the_same_weights_of_four_micro_batches(
    method: str, tiny_corpus: Corpus
) -> None:
    """On the same bases, which the first update, of one micro-batch, has chosen."""
    how: dict[str, Any] = {"weights": "fp32", "rank": 128, "gap": 100, "staggered": False}
    how["micro_batches"] = [1, 4, 4, 4]
    plain = trained(tiny_corpus, method, "unfused", **how)
    assert_same(plain, trained(tiny_corpus, method, "layer-major", **how))
    projected = trained(tiny_corpus, method, "fused+subspace", **how)
    if method in PROJECTED:
        assert 0 < distance(plain, projected) < PROJECTED[method]
    else:
        assert_same(plain, projected)
