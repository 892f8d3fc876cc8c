"""Draws from the softmax, against its probabilities."""

import math

import pytest
import torch
from torch import Tensor

from lowmem.kernels import drawn_targets as module
from lowmem.kernels.drawn_targets import drawn_targets
from lowmem.planner.live_bytes import LiveBytes


def tokens_alike(count: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, W, targets) of `count` tokens with these logits."""
    return torch.ones(count, 1), logits.unsqueeze(1), torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("elements", [1, 3 * 20000, 2**22])
def test_frequencies_are_the_probabilities(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the vocabulary falls into slices of 1, of 3, or into one."""
    monkeypatch.setattr(module, "SLICE_ELEMENTS", elements)
    count = 20000
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, -7.0, 2.9])
    drawn = drawn_targets(*tokens_alike(count, logits), seed=5)
    expected = logits.double().softmax(0)
    found = torch.bincount(drawn, minlength=len(logits)).double() / count
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4.5 * sigma).all()


def test_tokens_are_drawn_independently() -> None:
    """Of two fair coins beside each other, a quarter falls on each pair."""
    count = 40000
    drawn = drawn_targets(*tokens_alike(count, torch.zeros(2)), seed=1).view(-1, 2)
    pairs = torch.bincount(2 * drawn[:, 0] + drawn[:, 1], minlength=4).double() / (count / 2)
    assert ((pairs - 0.25).abs() < 4.5 * math.sqrt(0.25 * 0.75 / (count / 2))).all()


def test_noise_has_the_moments_and_the_tail_of_gumbel() -> None:
    noise = module._gumbel(2**20, 3, torch.device("cpu")).double()
    assert noise.isfinite().all()
    sigma = math.pi / math.sqrt(6)
    assert abs(noise.mean() - 0.5772157) < 4.5 * sigma / 2**10
    assert abs(noise.std() / sigma - 1) < 0.01  # 4.4 is the kurtosis: sigma of this is 0.0011
    beyond = -math.expm1(-math.exp(-10.0))  # P(G > 10) = 4.5e-5, 47.6 expected
    assert abs((noise > 10).sum() - 2**20 * beyond) < 4.5 * math.sqrt(2**20 * beyond)


def test_the_seed_decides_and_missing_targets_stay_missing() -> None:
    x, weight, targets = torch.randn(64, 8), torch.randn(50, 8), torch.arange(64) % 50
    targets[::3] = -100
    first = drawn_targets(x, weight, targets, seed=1)
    assert torch.equal(first, drawn_targets(x, weight, targets, seed=1))
    assert not torch.equal(first, drawn_targets(x, weight, targets, seed=2))
    assert torch.equal(first == -100, targets == -100)
    assert first.max() < 50


def test_bf16_weights_and_nan_give_targets_within_the_vocabulary() -> None:
    x = torch.randn(9, 8, dtype=torch.bfloat16)
    x[0] = math.nan
    drawn = drawn_targets(x, torch.randn(50, 8).bfloat16(), torch.zeros(9).long(), seed=1)
    assert ((drawn >= 0) & (drawn < 50)).all()


def test_logits_exist_for_a_slice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes on meta, and a few slices of them however large the vocabulary."""
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 2**14)
    peaks = {}
    for device in ("cpu", "meta"):
        x, weight = (torch.zeros(rows, 4, device=device) for rows in (64, 5000))
        tracker = LiveBytes(device)
        with tracker:
            drawn_targets(x, weight, torch.zeros(64, dtype=torch.int64, device=device), 1)
        peaks[device] = tracker.peak
    assert peaks["cpu"] == peaks["meta"]
    assert peaks["cpu"] < 4 * 2**14 * 4 < 64 * 5000 * 4
