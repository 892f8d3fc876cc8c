"""Writing a step: the order of decay, slices, and unbiased rounding."""

import pytest
import torch

from lowmem.kernels import slices
from lowmem.optim.weights import write


def step(weight: torch.Tensor, direction: torch.Tensor, **how: object) -> torch.Tensor:
    settings = {"lr": 0.1, "weight_decay": 0.5, "decay_first": False, "seed": 1} | how

    def add(rows: torch.Tensor, start: int, stop: int, alpha: float) -> None:
        rows.add_(direction[start:stop], alpha=alpha)

    write(weight, add, **settings)  # type: ignore[arg-type]
    return weight


def test_order_of_decay() -> None:
    weight, direction = torch.tensor([2.0]), torch.tensor([1.0])
    assert step(weight.clone(), direction, decay_first=True).item() == pytest.approx(1.8)
    assert step(weight.clone(), direction).item() == pytest.approx(1.9 * 0.95)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000,), (50, 20), (1, 77), (7, 300)])
def test_slicing_changes_nothing(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    direction = torch.randn(shape, generator=generator).to(dtype)
    whole = step(weight.clone(), direction)
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", {"cpu": 128})
    assert torch.equal(whole, step(weight.clone(), direction))


def test_small_steps_survive_in_bf16() -> None:
    """1e-4 is far below half the spacing of bf16 at 1 (2^-8), so nearest rounding drops it."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    for update in range(100):
        step(weight, torch.ones(4096), lr=1e-4, weight_decay=0.0, seed=update)
    moved = 1.0 - weight.float().mean().item()
    # Standard error: 100 draws of 2^-8 with probability 1e-4 * 2^8, over 4096 weights.
    assert moved == pytest.approx(0.01, abs=4 * 2**-8 * (100 * 0.0256) ** 0.5 / 64)
    nearest = torch.ones(1, dtype=torch.bfloat16) - 1e-4
    assert nearest.item() == 1.0
