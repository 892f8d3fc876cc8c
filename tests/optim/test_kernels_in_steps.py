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
from lowmem.kernels.unproject_write import Product
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.kernels.calls import Calls

WIDE = (24, 300)  # rows begin inside of blocks
TALL = (300, 24)
WHOLE = (24, 256), (300, 128)  # groups of codes end with the rows
CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def weight_of(form: str, shape: tuple[int, int], device: str) -> Any:
    values = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = values.to(torch.float32 if form == "fp32" else torch.bfloat16).to(device)
    return GroupedWeight.of(weight, 128) if form == "int8" else weight


def updated(
    form: str, method: str, options: dict[str, Any], choice: str, shape: tuple[int, int] = WIDE
) -> tuple[dict[str, Tensor], set[str]]:
    """Weight and states after three updates, and which kernels ran."""
    weight = weight_of(form, shape, DEVICE)
    with forced(choice), Calls() as calls:
        optimizer = Optimizer("unfused", seed=3)
        optimizer.add("w", weight, build_method(method, options).matrix, 0.1)
        for update in range(3):
            optimizer.begin(0.01, 1)
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(10 + update))
            optimizer.receive("w", 1e-3 * drawn.to(DEVICE))
            optimizer.step()
    stored = weight.values() if isinstance(weight, GroupedWeight) else weight.float()
    names = {operator.name().removeprefix("lowmem::") for operator, _ in calls.kernels}
    return {"w": stored} | dict(optimizer.state_tensors()), names


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if value.is_floating_point():
            # Three steps of 0.01; the last bit of a step may turn one stochastic rounding around.
            off = (found[key] - value).abs() > 1e-6 + 1e-5 * value.abs()
            assert off.float().mean() < 0.002, key
        else:
            assert found[key].ne(value).float().mean() < 0.002, key


CASES = [
    ("fp32", "adam8bit", {}),
    ("bf16", "adam8bit", {}),
    ("bf16", "adamw", {}),
    ("int8", "adam8bit", {}),
    ("int8", "q_apollo", {"rank": 8}),
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
    found, kernels = updated(form, method, options, "triton")
    wanted, none = updated(form, method, options, "reference")
    assert kernels
    assert not none
    compare(found, wanted)


EIGHT = {"rank": 8, "states": "8bit", "min_8bit": 0}
PRODUCTS = [
    ("bf16", WIDE, "galore", EIGHT),
    ("bf16", TALL, "galore", {"rank": 8}),
    ("int8", WHOLE[0], "galore", {"rank": 8}),
    ("int8", WHOLE[1], "q_galore", {"rank": 8}),
    ("bf16", WIDE, "q_galore", {"rank": 8}),
    ("fp32", WIDE, "fira", {"rank": 8}),
    ("bf16", TALL, "fira", {"rank": 8, "form": "paper"}),
    ("int8", WHOLE[0], "fira", EIGHT),
    ("bf16", TALL, "natural_galore", {"rank": 8}),
]


@needs_triton
@pytest.mark.parametrize(("form", "shape", "method", "options"), PRODUCTS, ids=str)
def test_a_low_rank_step_is_written_at_once(
    form: str,
    shape: tuple[int, int],
    method: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, kernels = updated(form, method, options, "triton", shape)
    name = "unproject_write_codes" if form == "int8" else "unproject_write"
    assert name in kernels
    assert not kernels & {"round_bf16", "group_quantize"}

    def unrounded(step: Product, rows: Tensor, start: int, stop: int, alpha: float) -> None:
        """PyTorch rounds a product in bfloat16 to it: that alone turns a tenth of the weights'
        roundings around."""
        rows.addmm_(step.first[start:stop].float(), step.second.float(), alpha=alpha)
        if step.rest is not None:
            step.rest(rows, start, stop, alpha)

    monkeypatch.setattr(Product, "__call__", unrounded)
    wanted, _ = updated(form, method, options, "reference", shape)
    compare(found, wanted)


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
