"""A strict restore: the saved state or an error that names what differs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.errors import CheckpointError
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.restore import restore_states


def filled() -> Optimizer:
    """Two weights after an update, one of them projected."""
    optimizer = Optimizer("fused", seed=1)
    optimizer.add("m", torch.ones(6, 3), build_method("galore", {"rank": 2}).matrix, 0.0)
    optimizer.add("v", torch.ones(5), build_method("adamw", {}).matrix, 0.0)
    optimizer.begin(0.1, 1)
    optimizer.receive("m", torch.randn(6, 3, generator=torch.Generator().manual_seed(9)))
    optimizer.receive("v", torch.ones(5))
    return optimizer


def test_states_are_named_by_parameter_and_key() -> None:
    optimizer = filled()
    assert [key for key, _ in optimizer.state_tensors()] == [
        *("m/basis", "m/log.energy", "m/log.overlap", "m/log.kept_bases"),
        *("m/exp_avg", "m/exp_avg_sq"),
        *("v/exp_avg", "v/exp_avg_sq"),
    ]
    numbers = optimizer.state_numbers()
    assert {name: set(values) for name, values in numbers.items()} == {
        "m": {"step", "seed", "right", "refresh_offset"},
        "v": {"step", "seed"},
    }
    assert numbers["m"]["step"] == 1


def test_a_restored_optimizer_is_the_saved_one() -> None:
    saved, fresh = filled(), filled()
    saved.begin(0.1, 1)
    saved.receive("v", torch.ones(5))
    restore_states(fresh, saved.state_tensors(), saved.state_numbers(), saved.updates)
    one, other = dict(fresh.state_tensors()), dict(saved.state_tensors())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert fresh.state_numbers() == saved.state_numbers()
    assert fresh.updates == saved.updates == 2


def without(key: str) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]:
    def change(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        if name != key:
            yield name, value

    return change


def replaced(key: str, make: Callable[[Tensor], Tensor]) -> Any:
    return lambda name, value: iter([(name, make(value) if name == key else value)])


@pytest.mark.parametrize(
    ("change", "message", "why"),
    [
        (without("m/exp_avg_sq"), "lacks optimizer state m/exp_avg_sq", "method or settings"),
        (without("v/exp_avg"), "lacks optimizer state v/exp_avg", "method or settings"),
        (
            lambda name, value: iter([(name.replace("v/exp_avg_sq", "v/exp_avg.codes"), value)]),
            r"optimizer state v/exp_avg\.codes does not belong",
            "this run expects nothing of that name",
        ),
        (
            replaced("m/basis", lambda value: value[:, :1]),
            "optimizer state m/basis does not belong",
            r"has (3, 1) torch.float32, this run expects (3, 2) torch.float32",
        ),
        (
            replaced("v/exp_avg", lambda value: value.bfloat16()),
            "optimizer state v/exp_avg does not belong",
            r"has (5,) torch.bfloat16, this run expects (5,) torch.float32",
        ),
    ],
    ids=["no moment", "no vector's moment", "another format", "another rank", "another dtype"],
)
def test_a_foreign_state_is_refused_by_name(change: Any, message: str, why: str) -> None:
    saved = filled()
    tensors = [pair for key, value in saved.state_tensors() for pair in change(key, value)]
    with pytest.raises(CheckpointError, match=message) as caught:
        restore_states(filled(), iter(tensors), saved.state_numbers(), 1)
    assert why in caught.value.why
    assert "settings the checkpoint was written with" in caught.value.fix


@pytest.mark.parametrize("name", ["m", "v"])
def test_missing_counters_are_refused_by_name(name: str) -> None:
    saved = filled()
    numbers = {key: value for key, value in saved.state_numbers().items() if key != name}
    with pytest.raises(CheckpointError, match=f"the counters of {name}"):
        restore_states(filled(), saved.state_tensors(), numbers, 1)


def test_a_missing_counter_is_refused() -> None:
    saved = filled()
    numbers = saved.state_numbers()
    del numbers["m"]["right"]
    with pytest.raises(CheckpointError, match="counters"):
        restore_states(filled(), saved.state_tensors(), numbers, 1)
