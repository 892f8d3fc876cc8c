import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels import linear_cross_entropy as module
from lowmem.kernels.linear_cross_entropy import cross_entropy, cross_entropy_backward
from lowmem.planner.live_bytes import LiveBytes

every_way = pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def set_slices(monkeypatch: pytest.MonkeyPatch, rows: int, elements: int = 2**18) -> None:
    """Rows of W in a slice, logits of it that are float32 at a time."""
    monkeypatch.setattr(module, "SLICE_ROWS", rows)
    monkeypatch.setattr(module, "slice_elements", lambda logits: elements)


def slow(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Loss and gradients by autograd in float64, all logits at once."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = functional.cross_entropy(x @ weight.t(), targets, reduction="sum") * scale
    return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))


def ours(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dW), where every slice of W is lost as soon as its gradient is handed over."""
    weight = weight.clone()
    slices: list[Tensor] = []
    loss, softmax = cross_entropy(x, weight, targets, scale, keep_logits=keep)

    def take(start: int, rows: Tensor) -> None:
        assert start == sum(len(slice_) for slice_ in slices)
        slices.append(rows)
        weight[start : start + len(rows)].fill_(torch.nan)

    grad_x = cross_entropy_backward(x, weight, targets, scale, softmax, take)
    assert not softmax.logits  # each was given up with its slice
    return loss, grad_x, torch.cat(slices)


def draw(n: int, h: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and targets, every third of them missing, others at both ends of the vocabulary."""
    targets = torch.randint(0, vocabulary, (n,))
    targets[1::5], targets[2::5] = 0, vocabulary - 1
    targets[::3] = -100
    return torch.randn(n, h), torch.randn(vocabulary, h), targets


def error(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).norm() / exact.norm())


@every_way
@pytest.mark.parametrize(("n", "h", "vocabulary"), [(1, 4, 5), (2, 1, 3), (29, 16, 101)])
@pytest.mark.parametrize("rows", [1, 7, 100, 101, 2**12])
@pytest.mark.parametrize("elements", [1, 60, 2**18])
def test_slices_equal_the_whole_in_float64(
    rows: int,
    elements: int,
    n: int,
    h: int,
    vocabulary: int,
    keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_slices(monkeypatch, rows, elements)
    x, weight, targets = draw(n, h, vocabulary)
    made = ours(x, weight, targets, 0.25, keep)
    # float32 sums of up to 101 products of size 1
    for mine, theirs in zip(made, slow(x, weight, targets, 0.25), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    assert made[0].dtype == torch.float32
    assert made[1][targets == -100].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slices(monkeypatch, 40, 300)
    x, weight, targets = draw(29, 16, 101)
    x, weight = x.to(dtype), weight.to(dtype)
    for again, kept in zip(
        ours(x, weight, targets, 0.3), ours(x, weight, targets, 0.3, keep=True), strict=True
    ):
        assert torch.equal(again, kept)


@every_way
def test_no_target_at_all_is_no_loss_and_no_gradient(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, 4)
    x, weight, targets = draw(6, 4, 9)
    made = ours(x, weight, targets.fill_(-100), 1.0, keep)
    assert all(part.eq(0).all() for part in made)


def test_large_logits_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slices(monkeypatch, 2)
    x, weight = torch.full((2, 1), 300.0), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, grad_x, _ = ours(x, weight, torch.tensor([0, 1]), 1.0)
    assert loss == 600
    assert grad_x.isfinite().all()


def test_a_target_outside_the_vocabulary_does_not_go_unseen() -> None:
    x, weight, _ = draw(2, 4, 9)
    assert cross_entropy(x, weight, torch.tensor([0, 9]), 1.0)[0].isnan()


def test_bf16_slices_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = draw(256, 32, 64)
    x, weight = x.bfloat16(), (weight / 4).bfloat16()
    _, exact_x, exact_weight = slow(x, weight, targets, 1.0)
    set_slices(monkeypatch, 1)
    _, grad_x, grad_weight = ours(x, weight, targets, 1.0)
    assert grad_x.dtype == torch.float32
    assert grad_weight.dtype == torch.bfloat16
    # Roundings to bf16 (relative 2^-9): of the logits, which are sums of size 1.4 here, of G, of
    # each of the 64 products and of their sum. With 64 sums in bf16 it is three times as much.
    assert error(grad_x, exact_x) < 2**-8
    assert error(grad_weight, exact_weight) < 2**-8


def peak(n: int, h: int, vocabulary: int, keep: bool, backward: bool) -> int:
    """Bytes above the inputs, bf16 on meta."""
    x = torch.empty(n, h, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocabulary, h, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    tracker = LiveBytes("meta")
    tracker.track([x, weight, targets], "batch")
    inputs = tracker.live
    with tracker:
        _, softmax = cross_entropy(x, weight, targets, 1.0, keep_logits=keep)
        if backward:
            cross_entropy_backward(x, weight, targets, 1.0, softmax, lambda start, rows: None)
    return tracker.peak - inputs


@pytest.mark.parametrize("n", [1, 2048, 20000])
def test_memory_is_that_of_a_slice(n: int) -> None:
    h, vocabulary, rows = 4096, 32000, 4096
    x_bytes, logits = 2 * n * h, 2 * n * rows
    # Two float32 pieces of the logits on their way, and numbers per token.
    scratch = 2 * 4 * 2**22 + 200 * n + 2**14
    assert peak(n, h, vocabulary, False, False) < logits + scratch
    # The float32 sum of dx takes twice the bytes of x, what a slice adds to it once.
    whole = 2 * x_bytes + logits + max(x_bytes, 2 * rows * h, scratch) + 100 * n
    assert peak(n, h, vocabulary, False, True) < whole + 2**14
    kept = 2 * n * (vocabulary - rows)
    assert kept < peak(n, h, vocabulary, True, True) < whole + kept + 2**14
