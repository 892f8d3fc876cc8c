"""Every method, with every one of its operations out of memory once: the same bits."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch

from lowmem.train.retried import RetriedCalls
from tests.optim.test_every_method import CASES, optimizer_of, run, weights_and_gradients
from tests.train.faults import Faults, every_one_once

UPDATES = 5  # with a gap of 3: the first choice of a subspace, and a later one
SHORT = ("adamw-8bit", "galore-8bit", "apollo", "fira-rotate", "cosmos", "scale", "frugal")


def final(case: str, mode: str, dtype: torch.dtype, *around: AbstractContextManager[Any]) -> Any:
    weights, gradients = weights_and_gradients(UPDATES, dtype=dtype)
    optimizer = optimizer_of(case, weights, mode)
    with ExitStack() as stack:
        for each in around:
            stack.enter_context(each)
        run(optimizer, gradients)
    return weights | dict(optimizer.state_tensors()), optimizer.state_numbers()


def require_equal_bits(case: str, mode: str, dtype: torch.dtype) -> None:
    expected, numbers = final(case, mode, dtype)
    faults, freed = Faults(every_one_once()), list[torch.OutOfMemoryError]()

    def free(error: torch.OutOfMemoryError) -> bool:
        freed.append(error)
        return True

    found, other_numbers = final(case, mode, dtype, faults, RetriedCalls([free]))
    assert faults.raised == len(freed) == faults.count / 2 > 50  # every single one
    assert numbers == other_numbers
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize("case", SHORT)
def test_a_method_goes_on_behind_every_call_that_failed(case: str) -> None:
    require_equal_bits(case, "fused", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["unfused", "fused+subspace", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_method_does(case: str, dtype: torch.dtype, mode: str) -> None:
    require_equal_bits(case, mode, dtype)


@pytest.mark.parametrize(
    ("failures", "able", "expected"), [(1, True, "a"), (2, True, "ab"), (2, False, "a")]
)
def test_what_helps_is_tried_in_its_turn_and_the_error_leaves_where_nothing_does(
    failures: int, able: bool, expected: str
) -> None:
    tried: list[str] = []

    def first(error: torch.OutOfMemoryError) -> bool:
        tried.append("a")
        return able

    def second(error: torch.OutOfMemoryError) -> bool:
        tried.append("b")
        return True

    with Faults(lambda number: number <= failures), RetriedCalls([first, second]):
        if able:
            assert torch.ones(2).sum() == 2
        else:
            with pytest.raises(torch.OutOfMemoryError):
                torch.ones(2)
    assert "".join(tried) == expected
