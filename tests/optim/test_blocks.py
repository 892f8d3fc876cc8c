"""Turns of whole matrices: who has them, and what memory they take."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.errors import CheckpointError
from lowmem.optim.blocks import (
    Blocks,
    Order,
    active_blocks,
    hold_worst_window,
    share_of,
    worst_window,
)
from lowmem.optim.formats import number
from lowmem.optim.method import Dense
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.restore import restore_states
from lowmem.optim.rules import Adam, Sgd
from tests.optim.block_orders import walked

ATTENTION, MLP = (8, 8), (22, 8)
LAYERS = 3
SHAPES = [ATTENTION, ATTENTION, ATTENTION, ATTENTION, MLP, MLP, MLP] * LAYERS
ORDERS: list[Order] = ["random", "ascending", "descending", "mirror"]


def optimizer_of(
    mode: Any = "unfused", device: str = "cpu", seed: int = 0, **options: Any
) -> Optimizer:
    """LAYERS layers of seven matrices."""
    method = build_method("frugal", {"gap": 2, **options}).matrix
    optimizer = Optimizer(mode, seed)
    for index, shape in enumerate(SHAPES):
        place = Place(0, "mlp.up", index, len(SHAPES))
        weight = torch.ones(shape, device=device)
        optimizer.add(str(index), weight, method, 0.0, place)
    return optimizer


def moments(optimizer: Optimizer) -> int:
    return sum(value.numel() for key, value in optimizer.state_tensors() if "exp_avg" in key)


def update(optimizer: Optimizer, after: Any = None, reverse: bool = False, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}
    optimizer.begin(0.01, 1)
    for name in reversed(grads) if reverse else grads:
        optimizer.receive(name, grads[name].to(optimizer.slots[name].weight.device))
        if after is not None:
            after()
    for name, slot in optimizer.slots.items():
        if slot.kept is not None:
            optimizer.apply(name)
            if after is not None:
                after()


@pytest.mark.parametrize("order", ["ascending", "descending", "mirror"])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 21])
def test_turns_are_those_of_the_released_pointer(order: Order, count: int) -> None:
    for share in range(0, count + 1, 2 if order == "mirror" else 1):
        for turn in range(2 * count + 1):
            expected = set(walked(order, count, share, turn))
            assert active_blocks(order, count, share, turn, 0) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_random_turns_are_uniform_and_of_the_right_number(seed: int) -> None:
    turns = [active_blocks("random", 12, 3, turn, seed) for turn in range(400)]
    assert all(len(turn) == 3 for turn in turns)
    met = [sum(index in turn for turn in turns) for index in range(12)]
    assert all(60 < times < 140 for times in met)  # 100 +- 9; 4 standard deviations
    assert turns != [active_blocks("random", 12, 3, turn, seed + 2) for turn in range(400)]


@pytest.mark.parametrize("order", ORDERS)
def test_all_matrices_agree_on_the_turns(order: Order) -> None:
    optimizer = optimizer_of(order=order, density=0.2, seed=3)
    seen = []
    for _ in range(8):
        update(optimizer)
        active = {n for n, slot in optimizer.slots.items() if slot.state["active"]}
        assert len(active) == round(0.2 * len(SHAPES))
        assert all(
            ("exp_avg" in slot.state) == (n in active) for n, slot in optimizer.slots.items()
        )
        seen.append(active)
    assert all(one == two for one, two in zip(seen[::2], seen[1::2], strict=True))  # gap 2
    assert seen[0] != seen[2]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["unfused", "fused", "fused+subspace"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_switch_never_holds_the_moments_of_two_turns(
    order: Order, mode: str, reverse: bool
) -> None:
    optimizer = optimizer_of(mode, order=order, density=0.2)
    elements = tuple(slot.weight.numel() for slot in optimizer.slots.values())
    most = 2 * sum(elements[index] for index in worst_window(elements, 0.2, order))
    counts: list[int] = []
    for _ in range(12):
        update(optimizer, lambda: counts.append(moments(optimizer)), reverse)
    assert max(counts) <= most
    assert max(counts) > 0


@pytest.mark.parametrize(
    ("order", "density"),
    [
        ("ascending", 0.2),
        ("ascending", 0.55),
        ("descending", 0.2),
        ("descending", 0.3),
        ("mirror", 0.2),
        ("mirror", 0.6),
    ],
)
def test_the_worst_window_is_the_largest_that_occurs(order: Order, density: float) -> None:
    elements = tuple(rows * columns for rows, columns in SHAPES)
    count = len(elements)
    share = share_of(density, count, order)
    occurring = [
        sum(elements[index] for index in walked(order, count, share, turn)) for turn in range(200)
    ]
    found = worst_window(elements, density, order)
    assert sum(elements[index] for index in found) == max(occurring)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_whole_layers_are_exactly_the_share_of_all_weights(order: Order) -> None:
    elements = tuple(rows * columns for rows, columns in SHAPES)
    found = worst_window(elements, 1 / LAYERS, order)
    assert sum(elements[index] for index in found) == sum(elements) // LAYERS


def test_the_worst_window_of_random_turns_is_the_largest_matrices() -> None:
    assert worst_window((1, 5, 2, 4, 3, 5), 0.5, "random") == {1, 3, 5}


@pytest.mark.parametrize("order", ORDERS)
def test_a_rehearsal_holds_as_much_as_any_window(order: Order) -> None:
    options: dict[str, Any] = {"order": order, "density": 0.2}
    rehearsed = optimizer_of(device="meta", **options)
    hold_worst_window(rehearsed)
    update(rehearsed)  # the first update leaves it so
    training, most = optimizer_of(**options), 0
    for _ in range(2 * len(SHAPES)):
        update(training)
        most = max(most, moments(training))
    if order == "random":
        assert moments(rehearsed) >= most
    else:
        assert moments(rehearsed) == most


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_a_checkpoint_of_another_turn_continues_bit_for_bit(states: str) -> None:
    options: dict[str, Any] = {"states": states, "min_8bit": 0, "density": 0.3, "order": "random"}
    whole = optimizer_of(**options)
    for number_ in range(7):
        update(whole, seed=number_)
    first, second = optimizer_of(**options), optimizer_of(**options)
    for number_ in range(5):
        update(first, seed=number_)
    restore_states(second, first.state_tensors(), first.state_numbers(), first.updates)
    for name, slot in first.slots.items():
        second.slots[name].weight.copy_(slot.weight)
    for number_ in range(5, 7):
        update(second, seed=number_)
    for name, slot in whole.slots.items():
        assert torch.equal(slot.weight, second.slots[name].weight)


@pytest.mark.parametrize("change", [{"density": 0.5}, {"order": "ascending"}, {"gap": 4}])
def test_a_checkpoint_with_other_turns_is_refused(change: dict[str, Any]) -> None:
    """Shapes do not tell the two apart: both hold moments of some matrices."""
    saved = optimizer_of(density=0.2)
    for _ in range(3):
        update(saved)
    other = optimizer_of(**{"density": 0.2} | change)
    with pytest.raises(CheckpointError):
        restore_states(other, saved.state_tensors(), saved.state_numbers(), saved.updates)


def test_a_checkpoint_of_another_method_is_refused() -> None:
    saved = Optimizer("unfused", 0)
    for index, shape in enumerate(SHAPES):
        saved.add(str(index), torch.ones(shape), Dense(Adam()), 0.0)
    with pytest.raises(CheckpointError):
        restore_states(optimizer_of(), saved.state_tensors(), saved.state_numbers(), 0)


def test_a_matrix_that_keeps_the_turn_starts_anew() -> None:
    """As every other does."""
    optimizer = Optimizer("unfused", 0)
    method = Blocks(1.0, "descending", 3, Dense(Adam()), Dense(Sgd(sign=True)))
    optimizer.add("weight", torch.zeros(4, 5), method, 0.0)
    for _ in range(4):
        optimizer.begin(0.01, 1)
        optimizer.receive("weight", torch.ones(4, 5))
        optimizer.step()
    state = optimizer.slots["weight"].state
    assert number(state, "since") == 3
    moment = state["exp_avg"]
    assert isinstance(moment, Tensor)
    torch.testing.assert_close(moment, torch.full((4, 5), 0.1))


def test_gradients_that_nobody_uses_are_not_held() -> None:
    """With no rule for them, an accumulated update keeps those of the active matrices only."""
    optimizer = optimizer_of("fused+subspace", density=0.2, state_free="no")
    optimizer.begin(0.01, 1)
    for index, shape in enumerate(SHAPES):
        optimizer.receive(str(index), torch.ones(shape))
    held = {n: slot.kept for n, slot in optimizer.slots.items()}
    for name, kept in held.items():
        assert isinstance(kept, torch.Tensor)
        whole = bool(optimizer.slots[name].state["active"])
        assert kept.untyped_storage().nbytes() == (4 * kept.numel() if whole else 0)


@pytest.mark.parametrize("count", [1, 2, 7, 14, 21])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_mirrored_turns_are_pairs(density: float, count: int) -> None:
    """As published where that is an even number, otherwise a neighbour of it."""
    share, published = share_of(density, count, "mirror"), round(density * count)
    assert share % 2 == 0
    assert share == published if published % 2 == 0 else abs(share - published) == 1
    assert len(active_blocks("mirror", count, share, 5, 0)) == share
