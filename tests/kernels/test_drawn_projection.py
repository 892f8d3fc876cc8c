"""Projection on a drawn line with norms: the formula, the drawn entries, one pass."""

import pytest
import torch
from torch import Tensor

from lowmem.kernels.dispatch import forced
from lowmem.kernels.drawn_projection import SEGMENT, channel_norms, in_one_pass, project_on_line
from lowmem.kernels.random_normal import normal
from tests.kernels.calls import Calls

SEED = 11
SHAPES = [(1, 1), (1, 600), (600, 1), (65, SEGMENT + 1), (SEGMENT + 1, 65), (64, 32), (3, 3)]
EMPTY = [(0, 5), (5, 0)]
both_sides = pytest.mark.parametrize("right", [True, False])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def gradient(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (1e-3 * torch.randn(shape, generator=generator)).to(dtype)


def check(full: Tensor, right: bool) -> None:
    """Against the formula in float64, element by element."""
    low, norms = project_on_line(full, SEED, right)
    lines = full.double() if right else full.double().T
    drawn = normal(lines.shape[1], SEED, device=full.device).to(full.dtype).double()
    shape = (full.shape[0], 1) if right else (1, full.shape[1])
    assert (low.shape, low.dtype) == (shape, full.dtype)
    assert (norms.shape, norms.dtype) == (shape, torch.float32)
    # As stated: s / 2^24 of the sum of magnitudes, and half a last bit of the result's dtype.
    wanted, magnitude = lines @ drawn, lines.abs() @ drawn.abs()
    half = 2.0**-24 if full.dtype == torch.float32 else 2.0**-8
    bound = lines.shape[1] * 2.0**-24 * magnitude + half * wanted.abs()
    assert ((low.double().view(-1) - wanted).abs() <= 1.001 * bound).all()
    wanted = lines.square().sum(dim=1).sqrt()
    assert ((norms.double().view(-1) - wanted).abs() <= 1e-6 * wanted).all()
    assert torch.equal(norms, channel_norms(full, right))


@both_sides
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_the_reference_is_the_formula(
    shape: tuple[int, int], right: bool, dtype: torch.dtype
) -> None:
    check(gradient(shape, dtype), right)


@both_sides
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_triton_is_the_formula(
    shape: tuple[int, int], right: bool, dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    with Calls() as calls:
        check(gradient(shape, dtype).to(triton_kernels), right)
    assert [func._schema.name for func, _ in calls.kernels].count("lowmem::drawn_projection") == 1


@both_sides
@both_dtypes
def test_entries_drawn_in_registers_are_those_of_the_reference(
    right: bool, dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    """A gradient of one 1 in every channel picks an entry each."""
    side = SEGMENT + 45
    low, norms = project_on_line(torch.eye(side, dtype=dtype, device=triton_kernels), SEED, right)
    with forced("reference"):
        drawn = normal(side, SEED, device=triton_kernels)
    assert torch.equal(low.view(-1), drawn.to(dtype))
    assert torch.equal(norms.view(-1), torch.ones_like(drawn))


@both_sides
@pytest.mark.parametrize("void", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_channel_only(
    void: float, right: bool, triton_kernels: torch.device
) -> None:
    full = gradient((70, 70), torch.bfloat16).to(triton_kernels)
    full[33, 34] = void
    low, norms = project_on_line(full, SEED, right)
    hit = torch.zeros(70, dtype=torch.bool)
    hit[33 if right else 34] = True
    for each in (low, norms):
        assert torch.equal(each.view(-1).isfinite().logical_not().cpu(), hit)


@both_sides
def test_a_strided_gradient_is_read_in_plain_pytorch(
    right: bool, triton_kernels: torch.device
) -> None:
    full = gradient((40, 30), torch.float32).to(triton_kernels).T
    assert not in_one_pass(full)
    check(full, right)
