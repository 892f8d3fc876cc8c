import pytest
import torch
from torch import Tensor

from lowmem.kernels import swiglu as module
from lowmem.kernels.swiglu import swiglu, swiglu_backward


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
