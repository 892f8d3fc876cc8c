import pytest
import torch
from torch import Tensor

from lowmem.kernels import swiglu as module
from lowmem.kernels.dispatch import forced
from lowmem.kernels.swiglu import swiglu, swiglu_backward
from tests.kernels.calls import Calls


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def formula(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 53)])
@pytest.mark.parametrize("slice_elements", [1, 100, 2**21])
def test_product_and_gradients_equal_autograd_of_the_formula(
    shape: tuple[int, int], slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_ELEMENTS", slice_elements)
    gate, up, grad = torch.randn(shape) * 4, torch.randn(shape), torch.randn(shape)
    leaves = gate.double().requires_grad_(), up.double().requires_grad_()
    slow = formula(*leaves)
    slow.backward(grad.double())
    # a few float32 roundings
    torch.testing.assert_close(swiglu(gate, up).double(), slow.detach(), rtol=1e-5, atol=1e-6)
    swiglu_backward(grad, gate, up)
    torch.testing.assert_close(gate.double(), leaves[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(up.double(), leaves[1].grad, rtol=1e-5, atol=1e-5)


HURTING = [(0, 3), (1, 1), (5, 3), (3, 1365), (33, 53)]
BOTH = [torch.float32, torch.bfloat16]
OFF = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
"""Relative: float32 exponentials differ in a few last bits; two roundings to bfloat16 may."""
EXTREMES = torch.tensor([0.0, -0.0, 1e-39, 20.0, -20.0, 100.0, -100.0, 3e38, -3e38])
BAD = torch.tensor([float("nan"), float("inf"), -float("inf")])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", HURTING)
def test_triton_gives_product_and_gradients_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    gate, up, grad = (torch.randn(shape).mul_(4).to(dtype).to(triton_kernels) for _ in range(3))
    extremes = torch.cat([EXTREMES, BAD])[: gate.numel()].to(gate)
    gate.view(-1)[: len(extremes)] = extremes
    before = grad.clone(), gate.clone(), up.clone()
    with Calls() as calls:
        product = swiglu(gate, up)
        swiglu_backward(grad, gate, up)
    assert len(calls.kernels) == 2
    with forced("reference"):
        wanted = swiglu(*before[1:])
        swiglu_backward(*before)
    for ours, theirs in ((product, wanted), (gate, before[1]), (up, before[2])):
        # where s(1 + x(1 - s)) passes through zero, an error of s counts against the factors' size
        torch.testing.assert_close(ours, theirs, rtol=OFF[dtype], atol=2e-6, equal_nan=True)
