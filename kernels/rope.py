"""Rotary position embedding: pairs of a head's features turn by an angle that grows with position.

Feature i is paired with i + D/2 (Hugging Face's `rotate_half` convention); pair i at position t
turns by t * f_i with f_i = theta^(-2i/D). A turn is orthogonal, so the gradient turns back.

Source: Su et al., arXiv:2104.09864; stretched frequencies: transformers' `modeling_rope_utils`.
"""

import math

import torch
from torch import Tensor

from lowmem.kernels.compiled import asked_to_compile, run
from lowmem.kernels.dispatch import Kernel

ROTATE = Kernel(
    "rotate(Tensor(a!) x, Tensor cos, Tensor sin, bool back) -> ()", triton="rope_triton"
)


def frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angle per position of every pair: float32 (D/2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / (theta**exponents)


def llama3_frequencies(
    plain: Tensor, factor: float, low: float, high: float, original_length: int
) -> Tensor:
    """LLaMA 3.1's stretch: slow pairs are divided by `factor`, fast ones stay, the rest blends.

    Slow: fewer than `low` turns within `original_length` positions; fast: more than `high`.
    """
    wavelength = 2 * math.pi / plain
    smooth = (original_length / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    stretched = torch.where(wavelength > original_length / low, plain / factor, blended)
    return torch.where(wavelength < original_length / high, plain, stretched)


def tables(frequency: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of all angles: float32 (T, D/2) each."""
    positions = torch.arange(length, dtype=torch.float32, device=frequency.device)
    angles = torch.outer(positions, frequency)
    return angles.cos(), angles.sin()


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Turn x (B, T, H, D) in place, or turn it `back`; computed in float32, rounded once."""
    if not asked_to_compile() and ROTATE.runs_on(x):
        ROTATE(x, cos, sin, back)
        return x
    run(_turn, x, cos, sin, -1 if back else 1)
    return x


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> None:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, D/2)
    turned = (first * cos).addcmul_(second, sin, value=-sign)
    other = (second * cos).addcmul_(first, sin, value=sign)
    first.copy_(turned)
    second.copy_(other)
