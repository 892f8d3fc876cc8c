import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels import linear_cross_entropy as module
from lowmem.kernels.linear_cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def slow(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Loss and gradients by autograd in float64, all logits at once."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = functional.cross_entropy(x @ weight.t(), targets, reduction="sum") * scale
    return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))


def draw(n: int, h: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, vocabulary, (n,))
    targets[::3] = -100
    return torch.randn(n, h), torch.randn(vocabulary, h), targets


@pytest.mark.parametrize(("n", "h", "vocabulary"), [(1, 4, 5), (2, 1, 3), (29, 16, 101)])
@pytest.mark.parametrize("slice_elements", [1, 303, 2**25])
def test_slices_equal_the_whole_in_float64(
    n: int, h: int, vocabulary: int, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE_ELEMENTS", slice_elements)
    x, weight, targets = draw(n, h, vocabulary)
    made = linear_cross_entropy(x, weight, targets, 0.25, with_gradients=True)
    # float32 sums of up to 101 products of size 1
    for ours, theirs in zip(made, slow(x, weight, targets, 0.25), strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert made[0].dtype == torch.float32


def test_without_gradients_only_the_loss_is_made() -> None:
    x, weight, targets = draw(29, 16, 101)
    loss, *gradients = linear_cross_entropy(x, weight, targets, 1.0, with_gradients=False)
    torch.testing.assert_close(loss.double(), slow(x, weight, targets, 1.0)[0], rtol=1e-6, atol=0)
    assert gradients == [None, None]


def test_no_target_at_all_is_no_loss_and_no_gradient() -> None:
    x, weight, targets = draw(6, 4, 9)
    made = linear_cross_entropy(x, weight, targets.fill_(-100), 1.0, with_gradients=True)
    assert all(part is not None and part.eq(0).all() for part in made)


def test_large_logits_do_not_overflow() -> None:
    x, weight = torch.full((2, 1), 300.0), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, grad_x, _ = linear_cross_entropy(x, weight, torch.tensor([0, 1]), 1.0, True)
    assert loss == 600
    assert grad_x is not None
    assert grad_x.isfinite().all()


def test_bf16_slices_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = draw(256, 32, 64)
    x, weight = x.bfloat16(), weight.bfloat16()
    whole = linear_cross_entropy(x, weight, targets, 1.0, with_gradients=True)[2]
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 4 * 64)
    _, grad_x, sliced = linear_cross_entropy(x, weight, targets, 1.0, with_gradients=True)
    assert whole is not None
    assert grad_x is not None
    assert sliced is not None
    assert grad_x.dtype == sliced.dtype == torch.bfloat16
    # Each slice's product is rounded to bf16 (relative 2^-9) and the sum once more; 64 sums in bf16
    # lie three times further away.
    assert (sliced - whole).double().norm() / whole.double().norm() < 2**-8
