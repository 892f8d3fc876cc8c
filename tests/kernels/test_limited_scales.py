"""Scales of channels and the limiter: the formula, and one launch like plain PyTorch."""

import math

import pytest
import torch
from torch import Tensor

from lowmem.kernels.limited_scales import limited_scales

GAMMA = 1.01
CHANNELS = [1, 7, 2047, 4099]


def drawn(channels: int, whole: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(over, under, norms), under zero in the first channel where there are several."""
    generator = torch.Generator().manual_seed(channels)
    over, under, norms = torch.rand(3, channels, generator=generator) + 0.1
    under[: channels > 1] = 0.0
    if whole:
        over, under = over[-1:], under[-1:]
    return tuple(each.view(1, -1).to(device) for each in (over, under, norms))


def formula(over: Tensor, under: Tensor, norms: Tensor, last: float) -> tuple[Tensor, float, bool]:
    """In float64: scales, the norm that is noted, and whether the limiter acted."""
    scales = over.double() / (under.double() + 1e-8)
    norm = (scales * norms.double()).norm().item()
    excess = max(norm / ((last + 1e-8) * GAMMA), 1.0)
    noted = norm / excess
    return scales / excess, noted if noted > 0 and math.isfinite(noted) else last, excess > 1


def check(channels: int, whole: bool, last: float, device: torch.device) -> None:
    over, under, norms = drawn(channels, whole, device)
    scales, noted, acted = formula(over, under, norms, last)
    before = torch.tensor(last, device=device)
    limited = torch.tensor(0.5, device=device)
    found = limited_scales(over, under, norms, before, limited, GAMMA)
    assert found.shape == scales.shape
    torch.testing.assert_close(found.double(), scales, rtol=2e-6, atol=0)
    assert before.item() == pytest.approx(noted, rel=2e-6)
    assert limited.item() == float(acted)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("last", [math.inf, 1e-3, 1e12])
def test_the_reference_is_the_formula(channels: int, whole: bool, last: float) -> None:
    check(channels, whole, last, torch.device("cpu"))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("last", [math.inf, 1e-3, 1e12])
def test_triton_is_the_formula(
    channels: int, whole: bool, last: float, triton_kernels: torch.device
) -> None:
    check(channels, whole, last, triton_kernels)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("void", [0.0, math.nan])
def test_a_norm_that_is_void_is_not_noted(
    void: float, whole: bool, triton_kernels: torch.device
) -> None:
    over, under, norms = drawn(5, whole, triton_kernels)
    norms.fill_(void)
    last, limited = (torch.tensor(x, device=triton_kernels) for x in (2.0, 0.5))
    scales = limited_scales(over, under, norms, last, limited, GAMMA)
    assert last.item() == 2.0
    assert limited.item() == 0.0
    assert scales.isnan().all() if math.isnan(void) else scales.isfinite().all()
