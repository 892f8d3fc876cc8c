"""Weights of which only 8-bit codes exist: steps survive, slices and modes change nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels import slices
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.groupwise import dequantize, quantize
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.weights import like, write

SHAPES = [(1000,), (50, 20), (1, 77), (7, 300), (300, 7)]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(weight: GroupedWeight, direction: Tensor, **how: Any) -> GroupedWeight:
    settings = {"lr": 0.1, "weight_decay": 0.0, "decay_first": False, "seed": 1} | how

    def add(rows: Tensor, start: int, stop: int, alpha: float) -> None:
        rows.add_(direction[start:stop], alpha=alpha)

    write(weight, add, **settings)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay_first", [False, True])
def test_a_step_lands_within_a_code(shape: tuple[int, ...], decay_first: bool) -> None:
    weight = GroupedWeight.of(draw(shape), 64, noise=None)
    before, direction = weight.values().double(), draw(shape, 1).double()
    moved(weight, direction.float(), weight_decay=0.5, decay_first=decay_first)
    expected = before * 0.95 - 0.1 * direction if decay_first else (before - 0.1 * direction) * 0.95
    code = weight.scales.repeat_interleave(64)[: before.numel()].view(shape)
    # The zero point is rounded too, so the two ends of a group may be cut by half a code more.
    assert ((weight.values() - expected).abs() / code).max() < 1.001
    assert ((weight.values() - expected).abs() / code).mean() < 0.3


@pytest.mark.parametrize("noise", ["nearest", "stochastic"])
@pytest.mark.parametrize("group", [16, 100, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_slicing_changes_nothing(
    shape: tuple[int, ...], group: int, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> GroupedWeight:
        weight = GroupedWeight.of(draw(shape), group)
        if noise == "nearest":
            weight.noise = None
        return moved(weight, draw(shape, 1))

    whole = run()
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", {"cpu": 128})
    cut = run()
    assert torch.equal(whole.codes, cut.codes)
    assert torch.equal(whole.scales, cut.scales)
    assert torch.equal(whole.zeros, cut.zeros)


def test_stochastic_rounding_keeps_small_steps_at_every_magnitude() -> None:
    """50 steps of a tenth of a code move weights by 5 codes on average, far from zero as near it.

    In bf16 the fraction of a ratio of 64 to 128 is rounded away and such weights do not move.
    """
    count = 256 * 400
    weight = GroupedWeight.of(draw((count,)) * 0.02)
    ratio = (weight.codes.view(-1, 256) - weight.zeros.unsqueeze(1)).abs()
    before, code = weight.values(), weight.scales.repeat_interleave(256)
    direction = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0) * code * 0.1
    for update in range(50):
        moved(weight, direction, lr=1.0, seed=update)
    share = ((before - weight.values()) / direction / 50).view(-1, 256)
    for low, high in ((0, 8), (8, 32), (32, 64), (64, 128)):
        inside = share[(ratio >= low) & (ratio < high)]
        # 50 draws of one code, each of deviation at most 0.5: 0.5 * sqrt(50) / 5 a weight.
        error = 4 * 0.71 / len(inside) ** 0.5
        assert inside.mean().item() == pytest.approx(1.0, abs=error)


def test_rounding_to_nearest_drops_small_steps() -> None:
    weight = GroupedWeight.of(draw((1, 2560)) * 0.02, noise=None)
    before = weight.values()
    direction = torch.full((1, 2560), weight.scales.min().item() * 0.1)
    moved(weight, direction, lr=1.0)
    assert (weight.values() - before).abs().mean() < 0.05 * direction.mean()


def test_scales_stay_float32_and_follow_the_weight() -> None:
    weight = GroupedWeight.of(draw((4, 256)).bfloat16())
    assert like(weight).dtype == torch.bfloat16
    for update in range(20):
        moved(weight, -like(weight).float() - 1.0, lr=0.5, seed=update)
    assert weight.scales.dtype == torch.float32
    assert weight.values().mean().item() == pytest.approx(10.0, abs=0.1)  # 20 steps of 0.5


def test_a_zero_point_of_one_byte_says_all_that_a_float_does() -> None:
    exact = draw((7, 300)) + 2.0
    weight = GroupedWeight.of(exact, 64)
    found = quantize(exact, 8, 64)
    assert weight.zeros.dtype == torch.uint8
    assert torch.equal(weight.zeros.float(), found.zeros)
    assert torch.equal(weight.values(), dequantize(*found, 64))


def test_noise_belongs_to_seed_and_element() -> None:
    """Replicas that share seed and update stay equal; another update rounds otherwise."""
    results = [
        moved(GroupedWeight.of(draw((8, 256))), draw((8, 256), 1), seed=seed).codes
        for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("q_galore", {"rank": 4, "gap": 3, "min_8bit": 0}),
    ("galore", {"rank": 4, "gap": 3}),
    ("adamw", {"states": "8bit"}),
]
every_method = pytest.mark.parametrize(("name", "options"), METHODS)


def optimizer_of(name: str, options: dict[str, Any], mode: Any, device: str = "cpu") -> Optimizer:
    optimizer = Optimizer(mode, seed=3)
    for key, shape in (("tall", (24, 10)), ("wide", (10, 700))):
        weight = GroupedWeight.of(draw(shape).to(device), 64)
        optimizer.add(key, weight, build_method(name, options).matrix, 0.1)
    return optimizer


def grouped(optimizer: Optimizer, name: str) -> GroupedWeight:
    weight = optimizer.slots[name].weight
    assert isinstance(weight, GroupedWeight)
    return weight


def feed(optimizer: Optimizer, updates: int) -> None:
    for update in range(updates):
        optimizer.begin(0.01, 1)
        for index, (name, slot) in enumerate(optimizer.slots.items()):
            grad = draw(tuple(slot.weight.shape), 10 * update + index)
            optimizer.receive(name, grad.to(slot.weight.device))
        optimizer.step()


@every_method
def test_every_update_mode_writes_the_same_codes(name: str, options: dict[str, Any]) -> None:
    modes = ("unfused", "fused", "fused+subspace")
    optimizers = [optimizer_of(name, options, mode) for mode in modes]
    for optimizer in optimizers:
        feed(optimizer, 7)
    for key in optimizers[0].slots:
        first, *others = (grouped(optimizer, key) for optimizer in optimizers)
        assert not torch.equal(first.codes, GroupedWeight.of(draw(tuple(first.shape)), 64).codes)
        assert all(torch.equal(first.codes, other.codes) for other in others)


@every_method
def test_a_meta_update_runs_and_counts_the_same_bytes(name: str, options: dict[str, Any]) -> None:
    on_meta, real = (optimizer_of(name, options, "unfused", each) for each in ("meta", "cpu"))
    for optimizer in (on_meta, real):
        feed(optimizer, 2)
    sizes = [{key: value.nbytes for key, value in each.state_tensors()} for each in (on_meta, real)]
    assert sizes[0] == sizes[1]


def test_codes_follow_what_a_float_weight_would_do() -> None:
    """Apart from rounding: 20 updates, each off by at most a code, without a drift."""
    coded = optimizer_of("q_galore", METHODS[0][1], "unfused")
    exact = Optimizer("unfused", seed=3)
    for key, slot in coded.slots.items():
        exact.add(key, grouped(coded, key).values(), slot.method, 0.1)
    for optimizer in (coded, exact):
        feed(optimizer, 20)
    for key, slot in exact.slots.items():
        weight = grouped(coded, key)
        error = (weight.values() - slot.weight) / weight.scales.mean()
        # A random walk of 20 steps of at most half a code of standard deviation.
        assert error.abs().max() < 5 * 0.5 * 20**0.5
        assert error.mean().abs() < 5 * 0.5 * 20**0.5 / error.numel() ** 0.5


def test_the_gradient_norm_that_clips_includes_weights_in_codes() -> None:
    optimizer = optimizer_of("galore", {"rank": 4}, "unfused")
    optimizer.begin(1.0, 1)
    squares = 0.0
    for name, slot in optimizer.slots.items():
        grad = draw(tuple(slot.weight.shape), 5)
        squares += grad.double().square().sum().item()
        optimizer.receive(name, grad)
    assert optimizer.norm().item() == pytest.approx(squares**0.5)
