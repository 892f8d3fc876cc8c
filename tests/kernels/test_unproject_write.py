"""A low-rank step is multiplied out and written as PyTorch does it in pieces."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.kernels.descent import Descent
from lowmem.kernels.dispatch import forced
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.scaled_write import Scaled
from lowmem.kernels.unproject_write import Product
from lowmem.optim.weights import write
from tests.kernels.calls import Calls

CPU = torch.device("cpu")
LR, DECAY, SEED, FIRST = 0.125, 0.25, 5, 3
FORMS = ["fp32", "bf16", "int8"]
# Rows, columns, rank: one element, one row, one column, parts of tiles, nothing to write, no rank.
SHAPES = [(1, 1, 1), (1, 256, 7), (65, 1, 40), (60, 257, 33), (130, 128, 16), (0, 128, 4)]
SHAPES = [*SHAPES, (66, 128, 0)]
# The kernel writes whole groups.
WRITTEN = [(form, shape) for form in FORMS for shape in SHAPES if form != "int8" or shape[1] >= 128]
WRITTEN.remove(("int8", (60, 257, 33)))
# With the decay first or last.
STEPS = [(None, True), ("rows", False), ("columns", True)]


def dtype_of(form: str) -> torch.dtype:
    return torch.float32 if form == "fp32" else torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A weight and its step. exact: all products and their sums are numbers that bfloat16 holds."""

    form: str
    shape: tuple[int, int, int]
    rest: str | None = None
    exact: bool = True
    device: torch.device = CPU

    def _drawn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(shape, generator=generator)
        return (drawn.mul(2).round().clamp(-2, 2) if self.exact else drawn).to(self.device)

    @property
    def step(self) -> Product:
        rows, columns, rank = self.shape
        dtype = dtype_of(self.form)
        first, second = self._drawn(1, rows, rank).to(dtype), self._drawn(2, rank, columns)
        if self.rest is None:
            return Product(first, second.to(dtype))
        lines = (rows, 1) if self.rest == "rows" else (1, columns)
        full = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
        rest = Scaled(full.to(self.device, dtype), self._drawn(4, *lines).exp2(), 0.5)
        return Product(first, second.to(dtype), rest)

    @property
    def weight(self) -> Any:
        rows, columns, _ = self.shape
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(6))
        weight = values.to(self.device, dtype_of(self.form))
        with forced("reference"):
            return GroupedWeight.of(weight, 128) if self.form == "int8" else weight

    def written(self, choice: str, step: Product | None = None, decay_first: bool = True) -> Any:
        """The weight after `write`, a tensor or codes."""
        weight = self.weight
        with forced(choice):
            write(
                weight,
                step or self.step,
                lr=LR,
                weight_decay=DECAY,
                decay_first=decay_first,
                seed=SEED,
                first_row=FIRST,
            )
        return weight


def parts(weight: Any) -> list[Tensor]:
    if isinstance(weight, GroupedWeight):
        return [weight.codes, weight.scales, weight.zeros]
    return [weight]


def values(weight: Any) -> Tensor:
    with forced("reference"):
        return weight.values() if isinstance(weight, GroupedWeight) else weight.float()


def slow(before: Tensor, step: Product, decay_first: bool) -> Tensor:
    """The formula in float64."""
    weight = before.double()
    decay = LR * DECAY
    if decay_first:
        weight = weight - decay * weight
    change = step.first.double() @ step.second.double()
    if step.rest is not None:
        rest = step.rest
        change = change + rest.factor * rest.scales.double() * rest.full.double()
    weight = weight - LR * change
    return weight if decay_first else weight - decay * weight


def room(form: str, wanted: Tensor) -> Tensor:
    """How far a rounding may move an element: to its neighbour, of bfloat16 or of its group's
    codes."""
    if form == "fp32":
        return torch.full_like(wanted, 1e-6)
    if form == "bf16":
        return wanted.abs() * 2**-7 + 1e-6
    lines = wanted.view(-1, 128)
    span = lines.clamp(min=0).amax(1, True) - lines.clamp(max=0).amin(1, True)
    return (span / 254).expand_as(lines).reshape(wanted.shape)


@pytest.mark.parametrize(("rest", "decay_first"), STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_pieces_follow_the_formula(form: str, rest: str | None, decay_first: bool) -> None:
    case = Case(form, (300, 256, 16), rest)
    wanted = slow(values(case.weight), case.step, decay_first)
    found = values(case.written("reference", decay_first=decay_first))
    assert ((found - wanted).abs() <= room(form, wanted)).all()


@pytest.mark.parametrize(("rest", "decay_first"), STEPS)
@pytest.mark.parametrize(("form", "shape"), WRITTEN, ids=str)
def test_triton_writes_the_bits_of_the_pieces(
    form: str,
    shape: tuple[int, int, int],
    rest: str | None,
    decay_first: bool,
    triton_kernels: torch.device,
) -> None:
    case = Case(form, shape, rest, device=triton_kernels)
    found = case.written("triton", decay_first=decay_first)
    wanted = case.written("reference", decay_first=decay_first)
    for ours, theirs in zip(parts(found), parts(wanted), strict=True):
        if form == "fp32" and rest and shape[0] == 1:  # a product of one row is added elsewhere
            torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=3e-7)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lines", ["rows", "columns"])
@pytest.mark.parametrize("form", FORMS)
def test_a_rest_is_added_with_the_roundings_of_pytorch(
    form: str, lines: str, triton_kernels: torch.device
) -> None:
    """Beside a product of zeros, with a factor and scales whose products with it are not exact."""
    case = Case(form, (66, 128, 4), lines, exact=False, device=triton_kernels)
    step = case.step
    assert step.rest is not None
    step = replace(step, first=torch.zeros_like(step.first), rest=replace(step.rest, factor=0.7))
    found, wanted = (parts(case.written(choice, step)) for choice in ("triton", "reference"))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_an_element_of_the_product_is_as_exact_as_promised(
    form: str, factors: torch.dtype, turned: bool, triton_kernels: torch.device
) -> None:
    case = Case(form, (70, 256, 100), "rows", exact=False, device=triton_kernels)
    step = case.step
    first, second = step.first.to(factors), step.second.to(factors)
    if turned:
        second = second.T.contiguous().T
    step = replace(step, first=first, second=second)
    wanted = slow(values(case.weight), step, decay_first=True)
    found = values(case.written("triton", step))
    sizes = first.double().abs() @ second.double().abs()
    rounded = form != "fp32" and factors == torch.float32
    product = (2 * 2**-8 * rounded + 100 * 2**-23) * sizes  # as the module says
    assert ((found - wanted).abs() <= room(form, wanted) + LR * product).all()


def test_factors_in_any_memory_order_give_the_same(triton_kernels: torch.device) -> None:
    case = Case("bf16", (70, 130, 20), "columns", device=triton_kernels)
    step = case.step
    wide = torch.zeros(20, 260, device=triton_kernels, dtype=torch.bfloat16)
    wide[:, ::2] = step.second
    wanted = case.written("triton")
    for first, second in [
        (step.first, step.second.T.contiguous().T),
        (step.first.T.contiguous().T, wide[:, ::2]),
    ]:
        found = case.written("triton", replace(step, first=first, second=second))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["first", "second", "rest", "weight"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_shows_where_the_pieces_show_it(
    form: str, where: str, bad: float, triton_kernels: torch.device
) -> None:
    case = Case(form, (70, 256, 3), "rows", device=triton_kernels)
    step = case.step
    assert step.rest is not None
    spoilt = {"first": step.first, "second": step.second, "rest": step.rest.full}
    if where in spoilt:
        spoilt[where][1, 2] = bad
    seen = []
    for choice in ("triton", "reference"):
        weight = case.weight
        if where == "weight" and form == "int8":
            weight.scales[3] = bad
        elif where == "weight":
            weight[1, 2] = bad
        with forced(choice):
            write(weight, step, lr=LR, weight_decay=0.0, decay_first=True, seed=SEED)
        seen.append(values(weight))
    finite = seen[1].isfinite()
    assert not finite.all()
    assert torch.equal(seen[0].isfinite(), finite)
    assert torch.equal(seen[0][finite], seen[1][finite])


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_rounding_is_unbiased(form: str, triton_kernels: torch.device) -> None:
    """Each group reaches from 0 to 1, and all other elements are the same number between codes."""
    rows, columns, rank = 128, 128, 16
    weight: Any = torch.zeros(rows, columns, dtype=torch.bfloat16, device=triton_kernels)
    second = torch.full((rank, columns), 0.8123 / rank, device=triton_kernels)
    second[:, 0] = 1 / rank
    if form == "int8":
        weight = GroupedWeight.of(weight, 128)
    step = Product(torch.ones(rows, rank, device=triton_kernels), second)
    with Calls() as calls, forced("triton"):
        write(weight, step, lr=-1.0, weight_decay=0.0, decay_first=True, seed=9)
    assert len(calls.kernels) == 1
    exact = (0.8123 / rank) * rank
    if triton_kernels.type == "cuda":  # what a card multiplies are bfloat16 factors
        exact = second[0, 1].bfloat16().item() * rank
    stored = values(weight)[:, 1:].double()
    spacing = (stored.max() - stored.min()).item()
    assert 0 < spacing <= 1.001 / 255
    # Four standard errors of a variable of two values.
    error = 4 * 0.5 * spacing / stored.numel() ** 0.5
    assert stored.mean().item() == pytest.approx(exact, abs=error)


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_noise_belongs_to_the_element(form: str, triton_kernels: torch.device) -> None:
    case = Case(form, (140, 128, 5), "rows", device=triton_kernels)
    whole, step, weight = case.written("triton"), case.step, case.weight
    assert step.rest is not None
    for start, stop in ((0, 64), (64, 140)):
        rest = replace(
            step.rest, full=step.rest.full[start:stop], scales=step.rest.scales[start:stop]
        )
        piece = weight.rows(start, stop) if form == "int8" else weight[start:stop]
        part = Product(step.first[start:stop], step.second, rest)
        write(
            piece,
            part,
            lr=LR,
            weight_decay=DECAY,
            decay_first=True,
            seed=SEED,
            first_row=FIRST + start,
        )
    assert all(map(torch.equal, parts(weight), parts(whole)))


def own_noise(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    return torch.zeros(count, device=device)


LEFT: dict[str, Callable[[], Any]] = {
    "float32 without a rest": lambda: torch.ones(16, 256),
    "a strided weight": lambda: torch.ones(256, 16, dtype=torch.bfloat16).T,
    "groups of several rows": lambda: GroupedWeight.of(torch.ones(16, 100), 128),
    "groups across rows": lambda: GroupedWeight.of(torch.ones(16, 192), 128),
    "groups no tile is cut into": lambda: GroupedWeight.of(torch.ones(16, 192), 96),
    "groups above a tile": lambda: GroupedWeight.of(torch.ones(16, 256), 256),
    "noise of another kind": lambda: GroupedWeight.of(torch.ones(16, 128), 128, own_noise),
}


@pytest.mark.parametrize("what", LEFT)
def test_weights_that_no_kernel_writes_are_left_to_the_pieces(what: str) -> None:
    weight = LEFT[what]()
    before = [each.clone() for each in parts(weight)]
    step = Product(torch.ones(16, 4), torch.ones(4, weight.shape[1]))
    with forced("triton"), Calls() as calls:
        done = step.write(weight, Descent(1.0, seed=1))
    assert not done
    assert not calls.kernels
    assert all(map(torch.equal, parts(weight), before))


@pytest.mark.parametrize("group", [1, 16, 64])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("span_zero", [False, True])
def test_groups_of_any_kind_that_fit_a_tile(
    group: int, noisy: bool, span_zero: bool, triton_kernels: torch.device
) -> None:
    stored = []
    step = Case("int8", (66, 192, 5), device=triton_kernels).step
    for choice in ("triton", "reference"):
        with forced("reference"):
            start = torch.randn(66, 192, generator=torch.Generator().manual_seed(6)) + 0.5
            weight = GroupedWeight.of(start.to(triton_kernels), group, span_zero=span_zero)
        if not noisy:
            weight = replace(weight, noise=None)
        with forced(choice), Calls() as calls:
            write(weight, step, lr=LR, weight_decay=0.0, decay_first=True, seed=SEED)
        assert [op.name() for op, _ in calls.kernels] == (
            ["lowmem::unproject_write_codes"] if choice == "triton" else []
        )
        stored.append(parts(weight))
    assert all(map(torch.equal, *stored))
