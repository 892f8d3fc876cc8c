"""Every method on a model whose matrices are 8-bit codes: it trains, and the mode changes nothing.

Gradients come from the model itself. Shapes are odd, so that groups run through the rows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.errors import ConfigError
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.methods import METHODS, method_spec
from lowmem.optim.step import gather

MODEL = ModelConfig.model_validate(
    {
        "hidden_size": 24,
        "intermediate_size": 41,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "initializer_range": 0.1,
    }
)
MODES = ("unfused", "fused+subspace", "fused")
UPDATES = 3


def settings(method: str) -> OptimizerConfig:
    takes = method_spec(method).arguments
    small = {"rank": 4, "gap": 2, "history": 2, "min_8bit": 0}
    chosen = {key: value for key, value in small.items() if key in takes}
    return OptimizerConfig.model_validate({"method": method, "weight_decay": 0.1} | chosen)


def trained(method: str, mode: Any) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, everything stored) after a few updates with the same batch."""
    model = Llama(MODEL, dtype=torch.float32, device="cpu", int8=True)
    model.initialise(1)
    optimizer = build_optimizer(
        settings(method), model.weights(), model.roles(), mode=mode, seed=2, head_dim=12
    )
    optimizer.attach(model)
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(50, (2, 2, 16), generator=generator)
    lr = 0.3 * method_spec(method).learning_rate(MODEL.parameters)
    losses = []
    for _ in range(UPDATES):
        whole = [(batch[0], batch[1])]
        loss, _ = gather(model, optimizer, whole, count=1, tokens=32, lr=lr, clip=None)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"adahessian"}))
def test_every_mode_writes_the_same_codes(method: str) -> None:
    plan = ("unfused",) if method == "sophia" else MODES
    first, *others = (trained(method, mode) for mode in plan)
    fresh = Llama(MODEL, dtype=torch.float32, device="cpu", int8=True)
    fresh.initialise(1)
    for name, weight in fresh.weights().items():
        if isinstance(weight, GroupedWeight):
            module = name.removesuffix("weight")
            assert not torch.equal(weight.codes, first[1][f"{module}codes"]), f"{name} stands still"
    assert first[0][-1] < first[0][0]
    for losses, stored in others:
        assert losses == first[0]
        assert all(torch.equal(value, first[1][name]) for name, value in stored.items())


def test_a_measured_hessian_needs_weights_that_can_be_moved_a_little() -> None:
    with pytest.raises(ConfigError, match="8-bit codes") as caught:
        trained("adahessian", "unfused")
    assert "--weights fp32" in caught.value.fix
