import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem.kernels import linear_cross_entropy as module
from lowmem.kernels.linear_cross_entropy import (
    by_tokens,
    by_vocabulary,
    linear_cross_entropy,
    slices_vocabulary,
)
from lowmem.planner.rehearse import LiveBytes

FORMS = [by_tokens, by_vocabulary]


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def set_slices(monkeypatch: pytest.MonkeyPatch, elements: int, rows: int) -> None:
    """Logits of a slice of tokens, rows of W in a slice of the vocabulary."""
    monkeypatch.setattr(module, "SLICE_ELEMENTS", elements)
    monkeypatch.setattr(module, "FEWEST_ROWS", rows)
    monkeypatch.setattr(module, "MOST_ROWS", rows)


def slow(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Loss and gradients by autograd in float64, all logits at once."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = functional.cross_entropy(x @ weight.t(), targets, reduction="sum") * scale
    return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))


def draw(n: int, h: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and targets, every third of them missing, others at both ends of the vocabulary."""
    targets = torch.randint(0, vocabulary, (n,))
    targets[1::5], targets[2::5] = 0, vocabulary - 1
    targets[::3] = -100
    return torch.randn(n, h), torch.randn(vocabulary, h), targets


def error(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(("n", "h", "vocabulary"), [(1, 4, 5), (2, 1, 3), (29, 16, 101)])
@pytest.mark.parametrize(
    ("form", "elements", "rows"),
    [
        *((by_tokens, elements, 1) for elements in (1, 303, 2**25)),
        *((by_vocabulary, 1, rows) for rows in (1, 7, 100, 101, 2**12)),
    ],
)
def test_slices_equal_the_whole_in_float64(
    form: module.Form,
    elements: int,
    rows: int,
    n: int,
    h: int,
    vocabulary: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_slices(monkeypatch, elements, rows)
    x, weight, targets = draw(n, h, vocabulary)
    made = form(x, weight, targets, 0.25, True)
    # float32 sums of up to 101 products of size 1
    for ours, theirs in zip(made, slow(x, weight, targets, 0.25), strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert made[0].dtype == torch.float32
    assert made[1] is not None
    assert made[1][targets == -100].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients_only_the_loss_is_made(
    form: module.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, 303, 7)
    x, weight, targets = draw(29, 16, 101)
    loss, *gradients = form(x, weight, targets, 1.0, False)
    torch.testing.assert_close(loss.double(), slow(x, weight, targets, 1.0)[0], rtol=1e-6, atol=0)
    assert gradients == [None, None]


@pytest.mark.parametrize("form", FORMS)
def test_no_target_at_all_is_no_loss_and_no_gradient(
    form: module.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_slices(monkeypatch, 18, 4)
    x, weight, targets = draw(6, 4, 9)
    made = form(x, weight, targets.fill_(-100), 1.0, True)
    assert all(part is not None and part.eq(0).all() for part in made)


@pytest.mark.parametrize("form", FORMS)
def test_large_logits_do_not_overflow(form: module.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slices(monkeypatch, 3, 2)
    x, weight = torch.full((2, 1), 300.0), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, grad_x, _ = form(x, weight, torch.tensor([0, 1]), 1.0, True)
    assert loss == 600
    assert grad_x is not None
    assert grad_x.isfinite().all()


def test_a_target_outside_the_vocabulary_does_not_go_unseen() -> None:
    x, weight, _ = draw(2, 4, 9)
    assert by_vocabulary(x, weight, torch.tensor([0, 9]), 1.0, False)[0].isnan()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        by_tokens(x, weight, torch.tensor([0, 9]), 1.0, False)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_slices_are_summed_in_float32(
    form: module.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, targets = draw(256, 32, 64)
    x, weight = x.bfloat16(), (weight / 4).bfloat16()
    _, exact_x, exact_weight = slow(x, weight, targets, 1.0)
    set_slices(monkeypatch, 4 * 64, 1)
    _, grad_x, grad_weight = form(x, weight, targets, 1.0, True)
    assert grad_x is not None
    assert grad_weight is not None
    assert grad_x.dtype == grad_weight.dtype == torch.bfloat16
    # Roundings to bf16 (relative 2^-9): of the logits, which are sums of size 1.4 here, of G, of
    # each of the 64 products and of their sum. With 64 sums in bf16 it is three times as much.
    assert error(grad_x, exact_x) < 2**-8
    assert error(grad_weight, exact_weight) < 2**-8


def test_both_forms_agree_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slices(monkeypatch, 64 * 500, 96)
    x, weight, targets = draw(256, 64, 500)
    x, weight = x.bfloat16(), (weight / 8).bfloat16()
    tokens, vocabulary = (form(x, weight, targets, 1.0, True) for form in FORMS)
    # The same logits, up to the order of sums in bf16 products; then roundings of 2^-9.
    assert error(vocabulary[0], tokens[0]) < 1e-5
    assert error(vocabulary[1], tokens[1]) < 2**-8
    assert error(vocabulary[2], tokens[2]) < 2**-8


@pytest.mark.parametrize(
    ("shape", "dtype", "sliced"),
    [
        ((32000, 1024), torch.bfloat16, False),  # 350M
        ((32000, 2048), torch.bfloat16, True),  # 1B
        ((32000, 2048), torch.float16, True),
        ((32000, 4096), torch.float32, False),
    ],
)
def test_the_vocabulary_is_sliced_for_large_heads_of_low_precision(
    shape: tuple[int, int], dtype: torch.dtype, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.empty(shape, dtype=dtype, device="meta")
    assert slices_vocabulary(weight) == sliced
    other = "by_tokens" if sliced else "by_vocabulary"
    monkeypatch.setattr(module, other, None)  # it would not be callable
    x = torch.empty(8, shape[1], dtype=dtype, device="meta")
    linear_cross_entropy(x, weight, torch.empty(8, dtype=torch.int64, device="meta"), 1.0, True)


def peak(form: module.Form, n: int, h: int, vocabulary: int, gradients: bool) -> int:
    """Bytes above the inputs, bf16 on meta."""
    x = torch.empty(n, h, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocabulary, h, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    tracker = LiveBytes("meta")
    tracker.track([x, weight, targets], "batch")
    inputs = tracker.live
    with tracker:
        form(x, weight, targets, 1.0, gradients)
    return tracker.peak - inputs


@pytest.mark.parametrize("n", [1, 2048, 20000])
def test_slices_of_the_vocabulary_need_hardly_more_than_the_gradients(n: int) -> None:
    h, vocabulary = 4096, 32000
    rows = min(2048, max(256, 2**24 // n))
    x_bytes, weight_bytes = 2 * n * h, 2 * vocabulary * h
    # float32 and bf16 logits of a slice, or its product on the way to dx; numbers per token.
    scratch = max(6 * n * rows, 2 * n * rows + x_bytes) + 100 * n + 2**14
    # The float32 sum of dx takes twice the bytes of dx.
    assert peak(by_vocabulary, n, h, vocabulary, True) < weight_bytes + 2 * x_bytes + scratch
    assert peak(by_vocabulary, n, h, vocabulary, False) < 6 * n * rows + 100 * n + 2**14


def test_slices_of_tokens_would_need_the_weight_three_times() -> None:
    weight_bytes = 2 * 32000 * 4096
    assert math.isclose(peak(by_tokens, 2048, 4096, 32000, True), 3 * weight_bytes, rel_tol=0.1)
