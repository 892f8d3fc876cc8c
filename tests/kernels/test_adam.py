"""Adam's moments and step in one pass, against the formula in float64."""

import pytest
import torch
from torch import Tensor

from lowmem.kernels.adam import add_adam_direction


def draws(count: int, *scales: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(count, generator=generator) for scale in scales]


@pytest.mark.parametrize("count", [1, 7, 256, 1000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("alpha", [-0.01, 1.0])
def test_it_follows_the_formula(
    count: int, betas: tuple[float, float], eps: float, alpha: float
) -> None:
    target, gradient, exp_avg, exp_avg_sq = draws(count, 1.0, 1e-3, 1e-3, 1e-3)
    exp_avg_sq.square_()
    (first, second), before = betas, target.double()
    m = first * exp_avg.double() + (1 - first) * gradient.double()
    v = second * exp_avg_sq.double() + (1 - second) * gradient.double() ** 2
    add_adam_direction(target, gradient, exp_avg, exp_avg_sq, alpha=alpha, betas=betas, eps=eps)
    # Sums of two float32 numbers; the quotient is at most about 30 here.
    torch.testing.assert_close(exp_avg.double(), m, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(exp_avg_sq.double(), v, atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(
        target.double(), before + alpha * m / (v.sqrt() + eps), atol=1e-5, rtol=1e-5
    )


def test_shapes_that_differ_are_noticed() -> None:
    """The fused kernel would write beyond the end."""
    target, gradient, exp_avg, exp_avg_sq = draws(8, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(AssertionError):
        add_adam_direction(
            target, gradient[:4], exp_avg, exp_avg_sq, alpha=1.0, betas=(0.9, 0.999), eps=1e-8
        )
