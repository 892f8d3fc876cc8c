"""Forward and backward of an update never wait for a result: a card is kept busy throughout.

What a step of each method does afterwards is traced in tests/optim. Training reads loss and norm
once per update, between both.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.kernels.dispatch import forced, rehearsing
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather

WAITING = {
    "_local_scalar_dense",  # .item(), float(tensor), a tensor as a condition
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
}
"""Operators whose caller has to know a value, or a shape that depends on values."""
CONFIG = ModelConfig(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=61,
)


class Trace(TorchDispatchMode):
    """Every operator with what it was called with, tensors by shape; which of them would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.waits: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        name = op.overloadpacket.__name__
        masked = name.startswith("index") and any(is_mask(each) for each in given)
        if name in WAITING or masked:
            self.waits.append(name)
        self.devices |= {t.device.type for t in (*given, *tree_leaves(made)) if is_tensor(t)}
        self.calls.append((str(op), repr([shape_of(each) for each in given])))
        return made


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() > 0


def shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return value


def pair(mode: Any, device: str, int8: bool = False) -> tuple[Llama, Optimizer]:
    attention = "flash" if device == "meta" else "auto"
    dtype = torch.bfloat16 if device == "meta" else torch.float32
    model = Llama(
        CONFIG, dtype=dtype, device=device, attention=attention, int8=int8, recompute="attn:1,full"
    )
    model.initialise(0)
    config = OptimizerConfig(method="adamw", lr=1e-3, weight_decay=0.1)
    optimizer = build_optimizer(
        config, model.weights(), model.roles(), mode=mode, seed=0, head_dim=8
    )
    optimizer.attach(model)
    return model, optimizer


def gathered(model: Llama, optimizer: Optimizer, seed: int, clip: float | None) -> Trace:
    """Two micro-batches of random tokens, some of them without a target."""
    generator = torch.Generator().manual_seed(seed)
    device = model.head_weight.device
    made = [torch.randint(0, 61, (2, 3, 16), generator=generator) for _ in range(2)]
    for inputs, targets in made:
        targets[inputs % 3 == 0] = -100
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in made]
    with Trace() as trace:
        gather(model, optimizer, batches, count=2, tokens=96, lr=1e-3, clip=clip)
    return trace


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("mode", ["unfused", "fused+subspace", "layer-major"])
def test_nothing_waits_for_a_value(mode: str, int8: bool) -> None:
    model, optimizer = pair(mode, "cpu", int8)
    trace = gathered(model, optimizer, 1, 1.0 if mode != "layer-major" else None)
    assert len(trace.calls) > 100
    assert trace.waits == []


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace", "layer-major"])
def test_nothing_moves_between_host_and_card(mode: str) -> None:
    """As planned for a card, kernels included: every tensor of an update is on one device."""
    with rehearsing("cuda"), forced("triton"):
        model, optimizer = pair(mode, "meta")
        trace = gathered(model, optimizer, 1, 1.0 if mode != "layer-major" else None)
    assert trace.devices == {"meta"}
    assert any("lowmem.rotate" in name for name, _ in trace.calls)


def test_the_same_operators_run_whatever_the_tokens() -> None:
    """What a CUDA graph records is right for every batch of that shape."""
    model, optimizer = pair("unfused", "cpu")
    traces = []
    for seed in (1, 2, 3):
        traces.append(gathered(model, optimizer, seed, 1.0).calls)
        optimizer.step()
    _, second, third = traces  # the first makes the rotary tables, too
    assert second == third


def test_a_trace_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Trace() as trace:
        float(x.sum())
        x[x > 1]
        if x.any():
            x.nonzero()
    assert {"_local_scalar_dense", "index", "is_nonzero", "nonzero"} >= set(trace.waits)
    assert len(trace.waits) >= 4
