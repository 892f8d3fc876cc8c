"""Sums of gradients in every format: exact where they say so, right on average where they round."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels.slices import SLICE_ELEMENTS
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.sums import CodedSum, HostSum, RoundedSum, Staging, Sum
from lowmem.optim.weights import GroupedWeight
from tests.optim.test_every_method import make
from tests.optim.test_optimizer import Descent

SHAPE = (150, 40)
ROWS = 32  # of a slice: 1280 elements, five blocks
FORMATS = ["bf16", "int8", "host"]
DRAWS = 300
LARGEST_ERROR = {"bf16": 2.0**-8, "int8": 1 / 127}  # of an addition, of the largest sum in a block

NOT_TENSORS = (RoundedSum, CodedSum, HostSum)

every_format = pytest.mark.parametrize("sums", FORMATS)
rounding = pytest.mark.parametrize("sums", ["bf16", "int8"])


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tensors here have several."""
    for device in SLICE_ELEMENTS:
        monkeypatch.setitem(SLICE_ELEMENTS, device, 1024)


def draw(count: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def empty(sums: str, shape: tuple[int, ...] = SHAPE) -> Sum:
    size, device = torch.Size(shape), torch.device("cpu")
    match sums:
        case "bf16":
            return RoundedSum.zeros(size, device)
        case "int8":
            return CodedSum.zeros(size, device)
    return HostSum("w", size, Staging(torch.empty(0)))


def summed(sums: str, pieces: list[Tensor], seed: int = 0) -> Sum:
    total = empty(sums, tuple(pieces[0].shape))
    for number, piece in enumerate(pieces):
        total.add(piece, 0, 1000 * seed + number)
    return total


@rounding
def test_a_sum_is_right_on_average(sums: str) -> None:
    """Of n draws the mean scatters by at most half an error over the root, per addition."""
    pieces = draw(4, (2, 512))
    exact = torch.stack(pieces).double().sum(dim=0)
    mean = torch.stack([summed(sums, pieces, s).whole().double() for s in range(DRAWS)]).mean(dim=0)
    largest = torch.stack(pieces).double().abs().sum(dim=0).view(-1, 256).amax(dim=1)
    unit = LARGEST_ERROR[sums] * largest.repeat_interleave(256).view(2, 512)
    off = (mean - exact) / unit
    assert off.abs().max() < 6 * 0.5 * (4 / DRAWS) ** 0.5
    # Rounded to nearest, every element would be off by the same in every draw; together they
    # scatter by this much only.
    assert off.mean().abs() < 6 * 0.5 * (4 / (DRAWS * off.numel())) ** 0.5


@rounding
def test_small_gradients_after_a_large_one_are_not_lost(sums: str) -> None:
    """A hundred thousandths beside a one, of which rounding to nearest leaves nothing."""
    large, small = torch.ones(16, 256), torch.full((16, 256), 1e-3)
    total = summed(sums, [large, *[small] * 100]).whole().float().mean().item()
    # 4096 elements, 100 additions of an error of at most half a unit.
    assert total == pytest.approx(1.1, abs=6 * LARGEST_ERROR[sums] * (100 / 4 / 4096) ** 0.5)


@rounding
def test_the_error_of_a_sum_has_its_bound(sums: str) -> None:
    """Every addition errs by less than a unit, and errors are independent."""
    pieces = draw(16)
    exact = torch.stack(pieces).double().sum(dim=0)
    off = (summed(sums, pieces).whole().double() - exact).norm() / exact.norm()
    # Of normal numbers: a unit of bf16 is at most 2^-7 of the number, and one of int8 a 127th of
    # the largest of 256, about 2.8 deviations. The error of rounding is at most half of it,
    # root-mean-square, and earlier sums are smaller by the root of their share.
    bound = {"bf16": 0.5 * 2.0**-7, "int8": 0.5 * 2.8 / 127}[sums] * (16 / 2) ** 0.5
    assert 0.1 * bound < off < bound


def test_a_sum_in_host_memory_is_that_of_float32() -> None:
    pieces = [piece.bfloat16() for piece in draw(5)]
    exact = pieces[0].float()
    for piece in pieces[1:]:
        exact = exact + piece
    total = summed("host", pieces)
    assert torch.equal(total.whole(), exact)
    assert torch.equal(total.square(), torch.linalg.vector_norm(exact).square())


def test_traffic_of_host_sums_is_counted() -> None:
    """Written once per micro-batch, read in all but the first; here read once more."""
    total = summed("host", draw(5))
    assert isinstance(total, HostSum)
    total.whole()
    elements, transfers = total.shape.numel(), total.staging.transfers
    assert (transfers.stored, transfers.fetched) == (4 * elements * 5, 4 * elements * (4 + 1))
    assert total.home.numel() == elements


def test_a_weight_keeps_its_host_memory_for_all_updates() -> None:
    """To pin it anew would take longer than to add it up."""
    optimizer = optimizer_of("adamw", "unfused", "host", torch.float32)
    assert optimizer.staging is not None
    places = []
    for _ in range(3):
        update(optimizer, draw(3), ROWS, torch.float32)
        places.append({name: home.data_ptr() for name, home in optimizer.staging._homes.items()})
    assert places[0] == places[1] == places[2]
    assert places[0].keys() == set(ROLES) - {"norm"}


@every_format
@pytest.mark.parametrize("rows", [ROWS, 64, 150])
def test_slices_have_the_same_bits_as_the_whole(sums: str, rows: int) -> None:
    pieces, total = draw(3), empty(sums)
    for number, piece in enumerate(pieces):
        for start in range(0, len(piece), rows):
            total.add(piece[start : start + rows], start * SHAPE[1], number)
    expected = summed(sums, pieces).whole()
    assert torch.equal(total.whole(), expected)
    for start in range(0, 150, rows):
        stop = min(150, start + rows)
        found = total.values(start * SHAPE[1], stop * SHAPE[1]).view(-1, SHAPE[1])
        assert torch.equal(found, expected[start:stop].float())


@every_format
def test_what_is_not_finite_stays_so(sums: str) -> None:
    pieces = draw(3)
    pieces[1][5, 5] = float("inf")
    total = summed(sums, pieces)
    assert not total.square().isfinite()
    assert not total.whole().isfinite().all()


ROLES = ("embedding", "head", "mlp.up", "norm")


def optimizer_of(
    case: str, mode: Any, sums: Any, dtype: torch.dtype, group: int | None = None, seed: int = 11
) -> Optimizer:
    """A weight per role, each with the method that the role has; the norm is small."""
    optimizer, method = Optimizer(mode, seed=seed, sums=sums), make(case)
    for role, weight in zip(ROLES, draw(len(ROLES)), strict=True):
        own: Any = weight.to(dtype) if role != "norm" else weight[0].to(dtype)
        if group is not None and role != "norm":
            own = GroupedWeight.of(own, group)
        optimizer.add(role, own, method.of(role), 0.1, Place(0, role, 0, 1, 4))
    return optimizer


def update(
    optimizer: Optimizer, gradients: list[Tensor], slices: int | None, dtype: torch.dtype
) -> Tensor:
    """One clipped update with these micro-batches; the norm."""
    optimizer.begin(0.01, len(gradients))
    for gradient in gradients:
        for role in ROLES:
            mine = (gradient[0] if role == "norm" else gradient).to(dtype)
            if slices is None or role == "norm":
                optimizer.receive(role, mine.clone())
                continue
            for start in range(0, len(mine), slices):
                optimizer.receive_rows(role, start, mine[start : start + slices].clone())
    norm = optimizer.norm()
    optimizer.clip(norm, 1.0)
    optimizer.step()
    return norm


def everything(optimizer: Optimizer) -> dict[str, Tensor]:
    found = dict(optimizer.state_tensors())
    for name, slot in optimizer.slots.items():
        weight = slot.weight
        found[name] = weight.values() if isinstance(weight, GroupedWeight) else weight
    return found


CASES = ["adamw", "adamw-8bit", "galore", "apollo", "scale", "muon", "frugal-svd", "cosmos"]


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
@pytest.mark.parametrize("case", CASES)
def test_sums_in_host_memory_change_no_bit(case: str, mode: str, group: int | None) -> None:
    """Of weights, states and norms, clipping included."""
    dtype = torch.bfloat16
    on_card, on_host = (optimizer_of(case, mode, s, dtype, group) for s in ("fp32", "host"))
    drawn = draw(6)
    for at in (0, 3):
        norms = [update(o, drawn[at : at + 3], ROWS, dtype) for o in (on_card, on_host)]
        assert torch.equal(*norms)
    ours, theirs = everything(on_host), everything(on_card)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert on_host.staging is not None
    assert on_host.staging.transfers.stored > 0
    assert not any(isinstance(slot.kept, HostSum) for slot in on_host.slots.values())


@rounding
@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_slices_have_the_same_bits(case: str, mode: str, sums: str) -> None:
    """Noise belongs to (seed, name, update, micro-batch, element), not to how pieces arrive."""
    dtype = torch.bfloat16
    whole, sliced = (optimizer_of(case, mode, sums, dtype) for _ in range(2))
    drawn = draw(6)
    for at in (0, 3):
        norms = [
            update(o, drawn[at : at + 3], slices, dtype)
            for o, slices in ((whole, None), (sliced, ROWS))
        ]
        assert torch.equal(*norms)
    ours, theirs = everything(sliced), everything(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@rounding
def test_noise_differs_between_weights_updates_micro_batches_and_seeds(sums: str) -> None:
    """Equal gradients everywhere: what is kept after every micro-batch has errors of its own."""
    (gradient,) = draw(1, (64, 64))
    errors: list[Tensor] = []
    for seed in (1, 2):
        optimizer = Optimizer("unfused", seed=seed, sums=sums)  # type: ignore[arg-type]
        for name in ("a", "b"):
            optimizer.add(name, torch.ones(64, 64), Descent(), 0.0)
        for _ in range(2):
            optimizer.begin(0.0, 3)
            for number in (1, 2):
                for name, slot in optimizer.slots.items():
                    before = (
                        slot.kept.whole().float() if isinstance(slot.kept, NOT_TENSORS) else 0.0
                    )
                    optimizer.receive(name, gradient.clone())
                    assert isinstance(slot.kept, NOT_TENSORS)
                    assert slot.summed == number
                    errors.append(slot.kept.whole().float() - before - gradient)
            optimizer.discard()
    for place, error in enumerate(errors):
        assert error.abs().max() > 0
        for other in errors[place + 1 :]:
            # Of independent errors the cosine is about 1/64; those of one and two micro-batches
            # share the grid.
            cosine = (error * other).sum() / (error.norm() * other.norm())
            assert cosine.abs() < 0.5
            assert not torch.equal(error, other)


@rounding
def test_an_update_that_is_repeated_has_the_same_bits(sums: str) -> None:
    """As after an error in its midst: sums dropped, the count of updates put back."""
    found = []
    for broken_off in (False, True):
        optimizer = optimizer_of("adamw", "unfused", sums, torch.float32)
        if broken_off:
            optimizer.begin(0.01, 3)
            optimizer.receive("head", draw(1)[0])
            optimizer.discard()
            optimizer.updates -= 1
        update(optimizer, draw(3), None, torch.float32)
        found.append(everything(optimizer))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@every_format
def test_a_single_gradient_is_no_sum(sums: str) -> None:
    rounded, exact = (optimizer_of("adamw", "unfused", s, torch.float32) for s in (sums, "fp32"))
    for optimizer in (rounded, exact):
        update(optimizer, draw(1), None, torch.float32)
    ours, theirs = everything(rounded), everything(exact)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@every_format
def test_small_tensors_are_summed_in_float32(sums: str) -> None:
    optimizer = optimizer_of("adamw", "unfused", sums, torch.float32)
    optimizer.begin(0.01, 2)
    for _ in range(2):
        optimizer.receive("norm", torch.full((40,), 2.0**-20 / 3))
        optimizer.receive("head", torch.ones(SHAPE))
    kept = optimizer.slots["norm"].kept
    assert isinstance(kept, Tensor)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, torch.full((40,), 2 * (2.0**-20 / 3)))
    assert isinstance(optimizer.slots["head"].kept, NOT_TENSORS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_that_leave_a_card_and_come_back_change_no_bit() -> None:
    """Gradients overwritten as soon as they are handed over, many more slices than places."""
    device, shape = torch.device("cuda"), torch.Size((512, 256))
    torch.cuda.manual_seed(1)
    pieces = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(6)]
    exact = torch.zeros(shape, device=device)
    total = HostSum("w", shape, Staging(exact))
    assert total.home.is_pinned()
    for piece in pieces:
        exact.add_(piece)
        handed = piece.clone()
        total.add(handed, 0, 0)
        handed.fill_(float("nan"))
    assert torch.equal(total.whole(), exact)
