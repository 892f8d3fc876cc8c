"""The logged norm of a decoder's gradient against one that is worked out apart from the optimizer.

The same values as float32 weights of another decoder, whose `.grad` the decoder itself fills; the
norm of those, in float64.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.kernels.slices import SLICE_ELEMENTS
from lowmem.model.llama import Llama
from lowmem.model.sink import ParameterGrads
from lowmem.optim.assign import build_optimizer
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather

MODEL = ModelConfig.model_validate(
    {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
)
GALORE = {"method": "galore", "rank": 16, "staggered": False}
TOKENS = 2 * 16
# Of gradients in float32 the two differ by the order of sums. A sum of 8-bit codes with errors of
# 1 % each, independent of it, is longer by half their square.
NEAR = {"fp32": 1e-5, "host": 1e-5, "bf16": 1e-4, "int8": 1e-3}


@pytest.fixture(autouse=True)
def several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 64)
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", 2048)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 300, (2 * count, 2, 16), generator=generator)
    return [(drawn[2 * at], drawn[2 * at + 1]) for at in range(count)]


def decoder(weights: str) -> Llama:
    model = Llama(MODEL, dtype=torch.float32, device="cpu", int8=weights == "int8")
    model.initialise(0)
    return model


def expected_gradients(model: Llama, count: int) -> dict[str, Tensor]:
    """Mean over the micro-batches, by name, of float weights with the same values."""
    plain = Llama(MODEL, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, weight in model.weights().items():
            values = weight if isinstance(weight, Tensor) else weight.values()
            plain.get_parameter(name).copy_(values)
    plain.sink = ParameterGrads(plain)
    for inputs, targets in batches(count):
        plain.loss(inputs, targets, count * TOKENS).backward()
    return {name: p.grad.double() for name, p in plain.named_parameters() if p.grad is not None}


def norm_of(
    model: Llama, settings: dict[str, Any], mode: Any, sums: Any, count: int
) -> tuple[float, Optimizer]:
    optimizer = build_optimizer(
        OptimizerConfig.model_validate(settings),
        model.weights(),
        model.roles(),
        mode=mode,
        seed=0,
        head_dim=16,
        sums=sums,
    )
    optimizer.attach(model)
    tokens = count * TOKENS
    _, norm = gather(
        model, optimizer, batches(count), count=count, tokens=tokens, lr=0.0, clip=None
    )
    return norm.item(), optimizer


def root(pieces: list[Tensor]) -> float:
    return torch.stack([piece.square().sum() for piece in pieces]).sum().sqrt().item()


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("mode", "method", "sums", "count", "said"),
    [
        ("unfused", "adamw", "fp32", 3, "gradient"),
        ("unfused", "adamw", "bf16", 3, "gradient"),
        ("unfused", "adamw", "int8", 3, "gradient"),
        ("unfused", "scale", "host", 3, "gradient"),
        ("unfused", "galore", "int8", 3, "gradient"),
        ("fused+subspace", "apollo", "fp32", 3, "gradient"),
        ("fused+subspace", "apollo", "int8", 3, "gradient"),
        ("fused", "adamw", "fp32", 1, "gradient, afterwards"),
        ("fused", "scale", "fp32", 1, "gradient, afterwards"),
        ("fused", "galore", "fp32", 1, "gradient, afterwards"),
    ],
)
def test_the_norm_is_that_of_the_whole_gradient(
    mode: str, method: str, sums: str, count: int, said: str, weights: str
) -> None:
    model = decoder(weights)
    expected = root(list(expected_gradients(model, count).values()))
    settings = GALORE if method == "galore" else {"method": method}
    norm, optimizer = norm_of(model, settings, mode, sums, count)
    assert norm == pytest.approx(expected, rel=NEAR[sums])
    assert optimizer.norm_of == said


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("sums", ["fp32", "bf16", "int8", "host"])
def test_in_the_subspace_the_norm_is_that_of_projections_and_whole_gradients(
    sums: str, weights: str
) -> None:
    model = decoder(weights)
    gradients = expected_gradients(model, 3)
    norm, optimizer = norm_of(model, GALORE, "fused+subspace", sums, 3)
    pieces = []
    for name, gradient in gradients.items():
        state = optimizer.slots[name].state
        basis = state.get("basis")
        if isinstance(basis, Tensor):
            q = basis.double()
            pieces.append(gradient @ q if state["right"] else q.T @ gradient)
        else:
            pieces.append(gradient)
    assert norm == pytest.approx(root(pieces), rel=max(NEAR[sums], 1e-4))  # a basis in float32
    assert norm < 0.99 * root(list(gradients.values()))
    assert optimizer.norm_of == "gradient and projections"
