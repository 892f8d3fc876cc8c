"""Memory that was really used, beside the plan's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.kernels.random_normal import lookup_table
from lowmem.planner.plan import Card, Choice, Memory, Plan
from lowmem.train.build import build
from lowmem.train.events import Event, Measured
from lowmem.train.measure import measured_peak, memory_bytes

MakeConfig = Callable[..., Config]


def plan_of(config: Config, tensors: int) -> Plan:
    card = Card("cpu", 10**9, 0, 0, 0, "measured", "cpu")
    choice = Choice("galore", 4, "fp32", "fp32", "unfused", "keep", 8, 1, None)
    return Plan(config, card, choice, Memory(tensors, tensors + 1, tensors + 2, {}, ""))


def rounded(count: int) -> int:
    return -(-count // 512) * 512


def test_the_peak_is_that_of_live_tensors_beside_the_plan(ready_config: MakeConfig) -> None:
    """Weights and states that exist, and the most that lived at one time inside."""
    config = ready_config()
    model, optimizer = build(config)
    tensors = [*model.parameters(), *(value for _, value in optimizer.state_tensors())]
    tensors.append(lookup_table("cpu"))  # of the projection's random start, which stays
    before = sum(rounded(tensor.nbytes) for tensor in tensors)
    events: list[Event] = []
    with measured_peak(model, optimizer, plan_of(config, 12345), events.append):
        large = torch.zeros(1000)
        del large
        small = torch.zeros(300)
    del small
    (event,) = events
    assert isinstance(event, Measured)
    assert (event.what, event.planned) == ("tensors", 12345)
    assert event.measured == before + rounded(4000)
    measured = {part.name: part.measured for part in event.parts}
    assert measured["weights"] == sum(rounded(weight.nbytes) for weight in model.parameters())
    assert measured["all else at the peak"] == rounded(4000)


def test_without_a_plan_nothing_is_measured(ready_config: MakeConfig) -> None:
    model, optimizer = build(ready_config())
    events: list[Event] = []
    with measured_peak(model, optimizer, None, events.append):
        torch.zeros(1000)
    assert events == []


def test_an_update_that_fails_reports_no_peak(ready_config: MakeConfig) -> None:
    config = ready_config()
    model, optimizer = build(config)
    events: list[Event] = []
    with (
        pytest.raises(MemoryError),
        measured_peak(model, optimizer, plan_of(config, 1), events.append),
    ):
        raise MemoryError
    assert events == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own figure")
def test_the_memory_of_a_process_is_in_bytes() -> None:
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    # Not less than this process's own peak; a process that it was started from may count too.
    assert 0.99 * peak < memory_bytes(torch.device("cpu")) < 50 * peak
