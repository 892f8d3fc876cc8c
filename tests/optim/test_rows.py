"""Gradients that arrive in row slices against the same gradients whole, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.weights import GroupedWeight
from lowmem.planner.live_bytes import LiveBytes
from tests.optim.test_every_method import CASES, make

SHAPE = (150, 40)
ROWS = 32  # 1280 elements: five blocks
MODES = ["unfused", "fused+subspace", "fused"]
ROLES = ("embedding", "head", "mlp.up")


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over all rows are made slice by slice, in the slices in which rows arrive."""
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", ROWS)


def draw(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(count)]


def optimizer_of(case: str, mode: Any, dtype: torch.dtype, group: int | None = None) -> Optimizer:
    """A weight per role, each with the method that the role has."""
    optimizer, method = Optimizer(mode, seed=11), make(case)
    for role, weight in zip(ROLES, draw(len(ROLES), dtype), strict=True):
        own: Any = weight if group is None else GroupedWeight.of(weight, group)
        optimizer.add(role, own, method.of(role), 0.1, Place(0, role, 0, 1, 4))
    return optimizer


def update(
    optimizer: Optimizer, gradients: list[Tensor], slices: int | None, clip: bool = False
) -> Tensor:
    """One update with these micro-batches; the norm."""
    optimizer.begin(0.01, len(gradients))
    for gradient in gradients:
        for role in ROLES:
            if slices is None:
                optimizer.receive(role, gradient.clone())
                continue
            for start in range(0, len(gradient), slices) if optimizer.wants_survey(role) else ():
                optimizer.survey_rows(role, start, gradient[start : start + slices])
            for start in range(0, len(gradient), slices):
                optimizer.receive_rows(role, start, gradient[start : start + slices].clone())
    norm = optimizer.norm()
    if clip:
        optimizer.clip(norm, 1.0)
    optimizer.step()
    return norm


def everything(optimizer: Optimizer) -> dict[str, Tensor]:
    found = dict(optimizer.state_tensors())
    for name, slot in optimizer.slots.items():
        coded = isinstance(slot.weight, GroupedWeight)
        parts = ("codes", "scales", "zeros") if coded else ()
        found |= {f"{name}.{part}": getattr(slot.weight, part) for part in parts}
        if not coded:
            found[name] = slot.weight
    return found


def check(
    case: str,
    mode: str,
    dtype: torch.dtype,
    micro: int = 1,
    group: int | None = None,
    slices: int = ROWS,
) -> None:
    whole, sliced = (optimizer_of(case, mode, dtype, group) for _ in range(2))
    drawn = draw(3 * micro, dtype)
    for at in range(0, 3 * micro, micro):
        norms = [
            update(optimizer, drawn[at : at + micro], size, clip=mode != "fused")
            for optimizer, size in ((whole, None), (sliced, slices))
        ]
        # The sum of the squares in another order; what follows is scaled by it.
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
    ours, theirs = everything(sliced), everything(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sliced.state_numbers() == whole.state_numbers()


@pytest.mark.parametrize("case", CASES)
def test_a_fused_update_in_slices_has_the_same_bits(case: str) -> None:
    check(case, "fused", torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["adamw", "adamw-8bit", "lion-bf16", "galore-8bit", "scale"])
@pytest.mark.parametrize("slices", [ROWS, 128, 1000])
def test_slices_of_any_length_have_the_same_bits_in_every_mode(
    case: str, mode: str, dtype: torch.dtype, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", slices)
    check(case, mode, dtype, slices=slices)


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
@pytest.mark.parametrize("case", ["adamw-8bit", "galore", "scale", "muon"])
def test_slices_of_several_micro_batches_are_summed_in_float32(case: str, mode: str) -> None:
    check(case, mode, torch.bfloat16, micro=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [128, 256, 160])  # 160: a slice is 5 blocks and 8 groups
def test_codes_are_written_the_same_in_slices(mode: str, group: int) -> None:
    check("adamw-8bit", mode, torch.bfloat16, group=group)
    check("scale", mode, torch.bfloat16, group=group)


def test_columns_are_normalised_without_the_whole_gradient() -> None:
    """Of SCALE's embedding; a second look at its rows takes the place of their memory."""
    (gradient,) = draw(1)
    optimizer = optimizer_of("scale", "fused", torch.float32)
    assert optimizer.wants_survey("embedding")
    assert not optimizer_of("scale", "unfused", torch.float32).wants_survey("embedding")
    update(optimizer, [gradient], ROWS)
    optimizer.begin(0.01, 1)
    with LiveBytes("cpu") as tracker:
        tracker.track([slot.weight for slot in optimizer.slots.values()], "weights")
        before = tracker.live
        for start in range(0, len(gradient), ROWS):
            optimizer.survey_rows("embedding", start, gradient[start : start + ROWS])
        optimizer.receive_rows("embedding", 0, gradient[:ROWS])
    assert tracker.peak - before < gradient.nbytes + 10 * ROWS * SHAPE[1] * 4


def rows_of_w(mode: Any = "fused") -> Optimizer:
    optimizer = Optimizer(mode, seed=1)
    optimizer.add("w", torch.ones(SHAPE), make("adamw").of("head"), 0.0)
    optimizer.begin(0.1, 1)
    return optimizer


def test_a_fused_slice_moves_its_rows_at_once_and_no_others() -> None:
    optimizer = rows_of_w()
    slot = optimizer.slots["w"]
    optimizer.receive_rows("w", 0, torch.ones(ROWS, 40))
    assert slot.weight[:ROWS].ne(1).all()
    assert slot.weight[ROWS:].eq(1).all()
    optimizer.receive_rows("w", ROWS, torch.ones(150 - ROWS, 40))
    assert slot.weight.eq(slot.weight[0, 0]).all()
    assert slot.state["step"] == 1
    assert slot.kept is None


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
def test_a_held_slice_moves_nothing_before_the_step(mode: str) -> None:
    optimizer = rows_of_w(mode)
    for start, count in ((0, 64), (64, 86)):
        optimizer.receive_rows("w", start, torch.ones(count, 40))
    assert optimizer.slots["w"].weight.eq(1).all()
    optimizer.step()
    assert optimizer.slots["w"].weight.ne(1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arrivals",
    [
        [(32, 32)],  # the first is missing
        [(0, 32), (64, 32)],  # one in between is
        [(0, 32), (0, 32)],  # twice
        [(0, 30), (30, 120)],  # begins amid a block
        [(0, 160)],  # too long
        [(0, 0)],
    ],
)
def test_slices_out_of_order_are_refused(mode: str, arrivals: list[tuple[int, int]]) -> None:
    optimizer = rows_of_w(mode)
    *good, (start, count) = arrivals
    for at, length in good:
        optimizer.receive_rows("w", at, torch.ones(length, 40))
    with pytest.raises(ValueError, match=f"rows {start} to {start + count} of w arrived where"):
        optimizer.receive_rows("w", start, torch.ones(count, 40))


def test_an_update_that_was_broken_off_leaves_no_slices_behind() -> None:
    optimizer = rows_of_w("unfused")
    optimizer.receive_rows("w", 0, torch.ones(ROWS, 40))
    optimizer.slots["w"].kept = None  # as who repeats an update does
    optimizer.begin(0.1, 1)
    optimizer.receive_rows("w", 0, torch.ones(SHAPE))
    assert torch.equal(optimizer.slots["w"].kept, torch.ones(SHAPE))  # type: ignore[arg-type]


def test_slices_are_held_for_an_estimate_or_dropped() -> None:
    optimizer = rows_of_w()
    optimizer.add("other", torch.ones(SHAPE), make("adamw").of("head"), 0.0)
    (gradient,) = draw(1)
    with optimizer.holding(["w"]):
        for name in ("w", "other"):
            for start in range(0, 150, ROWS):
                optimizer.receive_rows(name, start, gradient[start : start + ROWS])
    slots = optimizer.slots
    assert torch.equal(slots["w"].kept, gradient)  # type: ignore[arg-type]
    assert slots["other"].kept is None
    assert slots["other"].arriving is None
    assert slots["w"].weight.eq(1).all()
    assert slots["w"].state["step"] == 0


@pytest.mark.parametrize(
    ("case", "role", "by_rows"),
    [
        ("adamw", "head", True),
        ("adam8bit", "embedding", True),
        ("galore-8bit", "embedding", True),
        ("apollo_mini", "head", True),
        ("scale", "head", True),
        ("scale", "embedding", False),  # columns
        ("galore", "mlp.up", False),
        ("stable_spam", "head", False),
        ("adamp", "head", False),
    ],
)
def test_only_what_needs_it_is_put_together(case: str, role: str, by_rows: bool) -> None:
    """Peak on meta: slices and scratch, or the whole gradient too."""
    shape, rows = (64 * 4096, 64), 4096
    optimizer = Optimizer("fused", seed=1)
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    optimizer.add("w", weight, make(case).of(role), 0.0, Place(0, role))
    whole = 2 * weight.numel()
    tracker = LiveBytes("meta")
    tracker.track([weight, *(value for _, value in optimizer.state_tensors())], "weights")
    before = tracker.live
    optimizer.begin(0.1, 1)
    with tracker:
        for start in range(0, shape[0], rows):
            optimizer.receive_rows("w", start, weight.new_empty(rows, 64))
    # A piece of a slice is 2^18 elements here, and a rule has at most a dozen of them in float32.
    assert (tracker.peak - before < whole) == by_rows
