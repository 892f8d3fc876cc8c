"""Whole updates with Triton's kernels against the same updates in plain PyTorch."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.kernels.dispatch import forced
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.slices import SLICE_ELEMENTS
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.kernels.calls import Calls

SHAPE = (24, 300)  # rows begin inside of blocks
CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def weight_of(form: str, device: str) -> Any:
    values = 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight = values.to(torch.float32 if form == "fp32" else torch.bfloat16).to(device)
    return GroupedWeight.of(weight, 128) if form == "int8" else weight


def updated(form: str, method: str, options: dict[str, Any], choice: str) -> dict[str, Tensor]:
    """Weight and states after three updates."""
    with forced(choice), Calls() as calls:
        optimizer = Optimizer("unfused", seed=3)
        weight = weight_of(form, DEVICE)
        optimizer.add("w", weight, build_method(method, options).matrix, 0.1)
        for update in range(3):
            optimizer.begin(0.01, 1)
            drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + update))
            optimizer.receive("w", 1e-3 * drawn.to(DEVICE))
            optimizer.step()
    assert bool(calls.kernels) == (choice == "triton")
    stored = weight.values() if isinstance(weight, GroupedWeight) else weight.float()
    return {"w": stored} | dict(optimizer.state_tensors())


CASES = [
    ("fp32", "adam8bit", {}),
    ("bf16", "adam8bit", {}),
    ("bf16", "adamw", {}),
    ("int8", "adam8bit", {}),
    ("int8", "q_apollo", {"rank": 8}),
    ("bf16", "galore", {"rank": 8, "states": "8bit", "min_8bit": 0}),
    ("bf16", "apollo_mini", {}),
    ("fp32", "apollo_mini", {}),
    ("int8", "q_apollo_mini", {}),
    ("bf16", "apollo", {"rank": 8}),
]


@needs_triton
@pytest.mark.parametrize(("form", "method", "options"), CASES, ids=lambda each: str(each))
def test_kernels_make_the_step_of_the_reference(
    form: str, method: str, options: dict[str, Any]
) -> None:
    found = updated(form, method, options, "triton")
    wanted = updated(form, method, options, "reference")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if value.is_floating_point():
            # Three steps of 0.01; the last bit of a step may turn one stochastic rounding around.
            off = (found[key] - value).abs() > 1e-6 + 1e-5 * value.abs()
            assert off.float().mean() < 0.002, key
        else:
            assert found[key].ne(value).float().mean() < 0.002, key


TWO_PASSES = {
    "apollo_mini": ["drawn_projection", "limited_scales", "scaled_write"],
    "apollo": ["random_normal", "channel_norms", "limited_scales", "scaled_write"],
    "fira": ["channel_norms"],
}


class Largest(TorchDispatchMode):
    """The largest storage that an operator makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(a.untyped_storage()) for a in tree_leaves(args) if isinstance(a, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and id(made.untyped_storage()) not in given:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


@needs_triton
@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(512, 1376), (1376, 512)])
def test_a_card_reads_the_gradient_in_passes_and_makes_nothing_of_its_size(
    method: str, form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta, where the kernels have nothing to do and what is made around them is seen."""
    monkeypatch.setitem(SLICE_ELEMENTS, "cuda", 2**30)  # pieces would be whole
    weight: Any = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    if form == "int8":
        weight = GroupedWeight.empty(shape, 128, torch.bfloat16, "meta")
    optimizer = Optimizer("unfused", seed=3)
    options = {} if method == "apollo_mini" else {"rank": 8, "solver": "eigh"}
    optimizer.add("w", weight, build_method(method, options).matrix, 0.1)
    optimizer.begin(0.01, 1)
    optimizer.receive("w", torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    with forced("triton"), Calls() as calls, Largest() as largest:
        optimizer.step()
    names = [func._schema.name.removeprefix("lowmem::") for func, _ in calls.kernels]
    codes = "_codes" if form == "int8" else ""
    wanted = [name + codes if name == "scaled_write" else name for name in TWO_PASSES[method]]
    if method == "fira":  # its own write is another kernel's
        assert set(wanted) <= set(names)
    else:
        assert names == wanted
        assert largest.bytes < 2 * shape[0] * shape[1] / 8
