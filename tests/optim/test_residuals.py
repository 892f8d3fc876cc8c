"""What lies outside the subspace: by its formula, without the sign of noise, row by row."""

from typing import Any

import pytest
import torch

from lowmem.optim.coordinates import Lines, RandK
from lowmem.optim.formats import State
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.orthonormal import LeadingVectors, RandomPairs
from lowmem.optim.place import Place
from lowmem.optim.projectors import Projector
from lowmem.optim.residuals import SgdResidual, SignResidual
from lowmem.phases import phase
from lowmem.planner.live_bytes import LiveBytes
from tests.optim.steps import full, part

PROJECTORS: list[Projector] = [
    LeadingVectors(0.4),
    LeadingVectors(0.4, "reverse_std"),
    RandomPairs(0.4),
    Lines(0.4, "left"),
    RandK(0.4),
]


def parts_of(projector: Projector, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    state: State = {"step": 0, "seed": 1}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    low = projector.down(grad, state)
    direction = torch.randn(low.shape, generator=torch.Generator().manual_seed(3))
    inside = full(projector.up(direction, state), shape).double()
    captured = full(projector.up(low, state), shape).double()
    return grad, low, direction, state, inside, grad.double() - captured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lift", [SignResidual(0.5, 0.3), SgdResidual(0.5, 0.3)], ids=repr)
@pytest.mark.parametrize("shape", [(14, 8), (8, 14), (9, 9)])
@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_the_step_is_that_of_the_formula(
    projector: Projector, shape: tuple[int, int], lift: Any, dtype: torch.dtype
) -> None:
    grad, low, direction, state, inside, rest = parts_of(projector, shape, dtype)
    rest = torch.where(rest.abs() < 1e-5, 0.0, rest)
    expected = 0.5 * (2.0 * inside + 0.3 * (rest.sign() if "Sign" in repr(lift) else rest))
    step = lift(grad, low, direction, 2.0, projector, state)
    found = torch.cat([part(step, shape, 0, 3), part(step, shape, 3, shape[0])])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_noise_counts_as_zero_relative_to_the_largest_gradient() -> None:
    grad = torch.tensor([[1000.0, 1e-4, 1e-3, -1.0]])
    state: State = {"step": 0, "seed": 1}
    projector = Lines(0.0, "right")
    projector.init(state, grad, Place())
    low = projector.down(grad, state)
    for noise, expected in ((0.0, [1.0, 1, 1, -1]), (4 * 2.0**-23, [1.0, 0, 1, -1])):
        step = SignResidual(noise=noise)(grad, low, low.clone(), 1.0, projector, state)
        assert full(step, (1, 4)).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"projection": "blocks", "density": 1.0},
        {"projection": "blocks", "density": 0.0},
        {"projection": "columns", "density": 0.01},
        {"projection": "rows", "density": 0.01},
        {"projection": "randk", "density": 0.01},
        {"projection": "random", "density": 0.01},
        {"projection": "random", "density": 0.01, "side": "reverse_std"},
        {"projection": "random", "density": 0.01, "side": "full", "state_free": "sgd"},
    ],
    ids=repr,
)
def test_an_update_makes_nothing_of_full_size(options: dict[str, Any], dtype: torch.dtype) -> None:
    """16384 x 4096, in groups of rows of 16 MiB in float32."""
    shape = (16384, 4096)
    method: Method = build_method("frugal", options).matrix
    optimizer = Optimizer("unfused", 0)
    weight, grad = (torch.zeros(shape, dtype=dtype, device="meta") for _ in range(2))
    optimizer.add("weight", weight, method, 0.0)
    optimizer.begin(0.1, 1)
    optimizer.receive("weight", grad)
    tracker = LiveBytes("meta")
    tracker.track([weight, grad, *(value for _, value in optimizer.state_tensors())], "states")
    before = tracker.live
    with tracker, phase("update"):
        optimizer.apply("weight")
    # A copy of the weight, in bf16, is 128 MiB.
    assert tracker.peak - before < 110 * 2**20
