"""Whole updates of every method, traced: none makes the host wait for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.kernels.blockwise import lookup_tables
from lowmem.kernels.random_normal import lookup_table
from tests.optim.test_every_method import CASES, optimizer_of, weights_and_gradients

NAMES = ("tall", "wide", "vector")

READS_A_VALUE = {
    # A number or a boolean for Python, or a result whose shape depends on values.
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "_linalg_check_errors",
}


class Synchronising(TorchDispatchMode):
    """Notes every operator that would make the host wait, were its tensors on a CUDA device.

    device: what stands for it; a tensor elsewhere is in host memory, and a copy of more than a
    number of it waits, for the memory is pageable.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # An index that is a mask becomes numbers first.
        by_mask = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in tensors)
        if name in READS_A_VALUE or by_mask:
            self.found.add(name)
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        places = {t.device.type for t in tensors + results if t.ndim}
        if len(places | {self.device}) > 1 and self.device in places:
            self.found.add(f"{name} between {places}")
        return result


def traced(case: str, mode: Any, device: str, dtype: torch.dtype = torch.float32) -> set[str]:
    """What synchronises in four updates, of which the first and the last refresh."""
    micro = 1 if mode == "fused" else 2
    weights, gradients = weights_and_gradients(4, micro, dtype)
    there = {name: weights[name].to(device) for name in NAMES}
    optimizer = optimizer_of(case, there, mode, together=True)
    arrived = [[{n: b[n].to(device) for n in NAMES} for b in each] for each in gradients]
    with Synchronising(device) as trace:
        for micro_batches in arrived:
            optimizer.begin(0.01, micro)
            for batch in micro_batches:
                for name, gradient in batch.items():
                    optimizer.receive(name, gradient)
            norm = optimizer.norm()
            if mode != "fused":
                optimizer.clip(norm, 1.0)
            optimizer.step()
    return trace.found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "mode", ["unfused", pytest.param("fused", marks=pytest.mark.slow), "fused+subspace"]
)
def test_no_update_reads_a_value(case: str, mode: str) -> None:
    assert traced(case, mode, "cpu") == set()


@pytest.mark.parametrize("case", CASES)
def test_no_update_copies_between_host_and_device(case: str) -> None:
    """On meta, where reading a value is an error too, with the kernels of a card."""
    lookup_table("meta"), lookup_tables("meta")  # copied once in a process
    assert traced(case, "unfused", "meta", torch.bfloat16) == set()


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(2)),
    ],
)
def test_the_trace_sees_what_waits(waits: Callable[[Tensor], Any]) -> None:
    with Synchronising("cpu") as trace:
        waits(torch.ones(2, 2))
    assert trace.found


def test_the_trace_sees_a_copy() -> None:
    with Synchronising("meta") as trace:
        torch.ones(3, device="meta").mul(2.0).add_(1.0)
        assert not trace.found
        torch.ones(3).to("meta")
    assert trace.found
