"""Elements beyond 2^31 are read and written where they are, as in embeddings of 152,064 x 16,384.

Of a matrix on the CPU only the pages that are touched take memory.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import forced
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.kernels.rms_norm import rms_norm_again
from lowmem.kernels.rope import rotate_
from lowmem.kernels.scaled_write import Scaled
from lowmem.kernels.swiglu import swiglu
from lowmem.kernels.unproject_write import Product
from lowmem.optim.weights import rows_of, write
from tests.kernels.calls import Calls

WIDTH = 4096
ROWS = 2**31 // WIDTH + 40
TAIL = 4  # rows that are written and looked at
GROUP = 128
_LAST = 6  # programs of an axis


@pytest.fixture
def far_kernels(triton_kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where Triton is interpreted, only the last programs of every axis run."""
    if triton_kernels.type == "cuda":
        return triton_kernels
    from triton.runtime import interpreter

    first = [0, 0, 0]

    class LastPrograms(interpreter.GridExecutor):
        def __init__(self, fn: Any, names: Any, grid: tuple[int, ...], hooks: Any = ()) -> None:
            counts = (*grid, 1, 1)[:3]
            kept = tuple(min(count, _LAST) for count in counts)
            first[:] = [count - few for count, few in zip(counts, kept, strict=True)]
            super().__init__(fn, names, kept, hooks)

        def _restore_args_dev(self, *arguments: Any) -> None:
            """They are in the same memory; a copy would touch all of it."""

    def shifted(call: Callable[..., None]) -> Callable[..., None]:
        return lambda *at: call(*(begin + i for begin, i in zip(first, at, strict=True)))

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(interpreter, "GridExecutor", LastPrograms)
    for name in ("set_grid_dim", "set_grid_idx"):
        monkeypatch.setattr(builder, name, shifted(getattr(builder, name)))
    return triton_kernels


def matrix(seed: int, device: torch.device, width: int = WIDTH) -> Tensor:
    """(ROWS, width) bfloat16, of which the last rows hold numbers."""
    made = torch.empty(ROWS, width, dtype=torch.bfloat16, device=device)
    made[-TAIL:] = torch.randn(TAIL, width, generator=torch.Generator().manual_seed(seed))
    return made


def gated(device: torch.device) -> tuple[Tensor, Tensor]:
    gate, up = matrix(1, device), matrix(2, device)
    found = swiglu(gate, up)
    with forced("reference"):
        return found, swiglu(gate[-TAIL:], up[-TAIL:])


def normalised(device: torch.device) -> tuple[Tensor, Tensor]:
    x, weight = matrix(1, device), torch.rand(WIDTH, device=device).bfloat16()
    rstd = torch.empty(ROWS, 1, device=device)
    rstd[-TAIL:] = 0.7
    found = rms_norm_again(x, weight, rstd)
    with forced("reference"):
        return found, rms_norm_again(x[-TAIL:], weight, rstd[-TAIL:])


def rotated(device: torch.device) -> tuple[Tensor, Tensor]:
    x, angles = matrix(1, device).view(1, ROWS, -1, 128), torch.empty(ROWS, 64, device=device)
    angles[-TAIL:] = torch.linspace(0, 1, 64)
    wanted = x[:, -TAIL:].clone()
    found = rotate_(x, angles, angles)
    with forced("reference"):
        rotate_(wanted, angles[-TAIL:], angles[-TAIL:])
    return found.view(ROWS, WIDTH), wanted.view(TAIL, WIDTH)


def moved(step: Any, of_tail: Any, weight: Weight) -> tuple[Tensor, Tensor]:
    """The weight after a descent by the kernel; its last rows after one in plain PyTorch."""
    tail = rows_of(weight, ROWS - TAIL, ROWS)
    if isinstance(tail, GroupedWeight):
        own = {name: getattr(tail, name).clone() for name in ("codes", "scales", "zeros")}
        tail = replace(tail, **own)
    else:
        tail = tail.clone()
    with forced("reference"):
        write(
            tail, of_tail, lr=0.1, weight_decay=0.1, decay_first=True, seed=3, first_row=ROWS - TAIL
        )
    assert step.write(weight, Descent(-0.1, 0.1 * 0.1, True, seed=3))
    return stored(weight), stored(tail)


def stored(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.codes


def codes(device: torch.device) -> GroupedWeight:
    weight = GroupedWeight.empty((ROWS, WIDTH), GROUP, torch.bfloat16, device)
    with forced("reference"):
        weight.rows(ROWS - TAIL, ROWS).store(matrix(3, device)[-TAIL:].float())
    return weight


def scaled(device: torch.device, weight: Weight) -> tuple[Tensor, Tensor]:
    full, scales = matrix(1, device), torch.empty(ROWS, 1, device=device)
    scales[-TAIL:] = torch.rand(TAIL, 1)
    tail = Scaled(full[-TAIL:], scales[-TAIL:], 0.7)
    return moved(Scaled(full, scales, 0.7), tail, weight)


def unprojected(device: torch.device, weight: Weight) -> tuple[Tensor, Tensor]:
    """Beside a product of zeros: that of bfloat16 factors is rounded otherwise in pieces."""
    first, second = torch.zeros(ROWS, 16), torch.ones(16, WIDTH)
    full, scales = matrix(1, device), torch.rand(1, WIDTH, device=device)
    factors = (first.to(device, torch.bfloat16), second.to(device, torch.bfloat16))
    rest, tail = Scaled(full, scales, 0.7), Scaled(full[-TAIL:], scales, 0.7)
    step, part = Product(*factors, rest), Product(factors[0][-TAIL:], factors[1], tail)
    return moved(step, part, weight)


def dequantized(device: torch.device) -> tuple[Tensor, Tensor]:
    weight = codes(device)
    found = weight.values(torch.bfloat16)
    with forced("reference"):
        return found, weight.rows(ROWS - TAIL, ROWS).values(torch.bfloat16)


FAR: dict[str, Callable[[torch.device], tuple[Tensor, Tensor]]] = {
    "swiglu": gated,
    "rms_norm_again": normalised,
    "rotate": rotated,
    "scaled_write": lambda device: scaled(device, matrix(3, device)),
    "scaled_write_codes": lambda device: scaled(device, codes(device)),
    "unproject_write": lambda device: unprojected(device, matrix(3, device)),
    "unproject_write_codes": lambda device: unprojected(device, codes(device)),
    "group_dequantize": dequantized,
}


@pytest.mark.parametrize("operator", FAR)
def test_the_last_elements_of_a_large_matrix_are_found(
    operator: str, far_kernels: torch.device
) -> None:
    with Calls() as calls:
        found, wanted = FAR[operator](far_kernels)
    assert operator in [func._schema.name.removeprefix("lowmem::") for func, _ in calls.kernels]
    assert found.numel() > 2**31
    last = wanted[-1, -128:]  # of the last program of any of them
    assert last.float().unique().numel() > 30
    # An exponential of a card may differ in its last bit.
    torch.testing.assert_close(found[-1, -128:], last, rtol=2**-7, atol=0)
