"""Chosen lines and entries: which, how often, and back to where they came from."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels import slices
from lowmem.optim.coordinates import Lines, RandK
from lowmem.optim.formats import State, tensor
from lowmem.optim.place import Place
from lowmem.optim.projectors import Projector
from tests.optim.steps import part

PROJECTORS: dict[str, Projector] = {
    "columns": Lines(0.4, "right"),
    "rows": Lines(0.4, "left"),
    "both": Lines(0.4, "full"),
    "entries": RandK(0.4),
    "none": Lines(0.0),
    "no entries": RandK(0.0),
    "all": Lines(1.0, "full"),
    "all entries": RandK(1.0),
}


def refreshed(projector: Projector, grad: Tensor, seed: int = 1) -> State:
    state: State = {"step": 0, "seed": seed}
    projector.init(state, grad, Place())
    projector.refresh(grad, state)
    return state


def mask_of(state: State, shape: tuple[int, int]) -> Tensor:
    """1 where an entry is chosen."""
    mask = torch.zeros(shape)
    if "positions" in state:
        mask.view(-1)[tensor(state, "positions").long()] = 1
        return mask
    rows = tensor(state, "rows").long() if "rows" in state else torch.arange(shape[0])
    columns = tensor(state, "columns").long() if "columns" in state else torch.arange(shape[1])
    mask[rows.unsqueeze(1), columns] = 1
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6), (1, 5), (700, 200)])
@pytest.mark.parametrize("what", PROJECTORS)
def test_what_is_chosen_comes_back_to_its_place_and_nothing_else(
    what: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """700 x 200 is three strata; the groups of rows do not end where those do."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    projector = PROJECTORS[what]
    state = refreshed(projector, grad)
    low = projector.down(grad, state)
    step = projector.up(low, state)
    borders = sorted({0, shape[0] // 3, shape[0] // 3 + 1, shape[0]})
    back = torch.cat([part(step, shape, start, stop) for start, stop in pairwise(borders)])
    mask = mask_of(state, shape)
    assert torch.equal(back, grad.float() * mask)
    assert low.numel() == mask.sum()  # no repetition
    assert state["whole"] == int(bool(mask.all()))


def test_a_non_finite_entry_stays_where_it_was_chosen() -> None:
    """Rows that were not chosen read some chosen row, and must not take its NaN over."""
    grad = torch.full((300, 400), float("nan"))
    for projector in (Lines(0.5, "left"), RandK(0.5)):
        state = refreshed(projector, grad)
        back = part(projector.up(projector.down(grad, state), state), (300, 400), 0, 300)
        assert torch.equal(back.isnan(), mask_of(state, (300, 400)).bool())


@pytest.mark.parametrize(("what", "share"), [("columns", 0.4), ("rows", 0.4), ("entries", 0.4)])
def test_every_entry_is_chosen_equally_often(what: str, share: float) -> None:
    grad = torch.zeros(5, 10)
    masks = [mask_of(refreshed(PROJECTORS[what], grad, seed), (5, 10)) for seed in range(500)]
    often = torch.stack(masks).mean(dim=0)
    assert (often - share).abs().max() < 0.1  # 4.5 standard deviations of 500 draws
    together = torch.stack(masks).view(500, -1)[:, [0, -1]].prod(dim=1).mean()
    assert together < share  # opposite corners are not tied to one another


def test_strata_share_the_entries_evenly() -> None:
    grad = torch.zeros(900, 250)  # 3.4 strata
    state = refreshed(RandK(0.3), grad)
    positions = tensor(state, "positions").long()
    assert positions.numel() == int(0.3 * 900 * 250)
    counts = torch.bincount(positions // 2**16)
    expected = torch.tensor([2**16, 2**16, 2**16, 900 * 250 - 3 * 2**16]) * 0.3
    assert (counts - expected).abs().max() <= 1


def test_the_choice_does_not_depend_on_the_size_of_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card works on 64 strata at once, a CPU on one."""
    grad, found = torch.zeros(900, 250), []
    for elements in (2**14, 2**16, 2**17, 2**22):
        monkeypatch.setitem(slices.SLICE_ELEMENTS, "cpu", elements)
        found.append(tensor(refreshed(RandK(0.3), grad), "positions"))
    assert all(torch.equal(found[0], other) for other in found)


def test_another_refresh_and_another_weight_choose_anew() -> None:
    grad = torch.zeros(30, 40)
    for projector in (Lines(0.4), RandK(0.4)):
        state, other = refreshed(projector, grad), refreshed(projector, grad, seed=2)
        first = mask_of(state, (30, 40))
        projector.refresh(grad, state)
        assert not torch.equal(first, mask_of(state, (30, 40)))
        assert not torch.equal(first, mask_of(other, (30, 40)))


@pytest.mark.parametrize(
    ("projector", "count"),
    [
        (Lines(0.25, "right"), 2),  # 2.5, half to even
        (Lines(0.35, "right"), 4),  # 3.5
        (Lines(0.25, "right", rounded=False), 2),
        (Lines(0.39, "right", rounded=False), 3),
        (RandK(0.29), int(0.29 * 14 * 10)),
    ],
)
def test_the_number_is_rounded_as_published(projector: Any, count: int) -> None:
    state = refreshed(projector, torch.zeros(14, 10))
    key = "positions" if isinstance(projector, RandK) else "columns"
    assert tensor(state, key).numel() == count
    assert tensor(state, key).dtype == torch.int32
