"""What times kernels: the arguments it turns through, and the median it takes."""

import pytest
import torch

from lowmem.kernels import measure

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cache", "sets"), [(0, 1), (100, 2), (2048, 5), (2047, 5), (2049, 6)]
)  # of 1024 bytes each
def test_twice_the_cache_lies_between_two_uses_of_an_argument(cache: int, sets: int) -> None:
    made: list[torch.Tensor] = []
    used: list[int] = []

    def make() -> tuple[torch.Tensor, ...]:
        made.append(torch.full((256,), float(len(made))))
        return (made[-1],)

    work = measure.rotating(make, lambda x: used.append(int(x[0])), cache)
    for _ in range(2 * sets):
        work()
    assert len(made) == sets
    assert used == 2 * list(range(sets))
    assert 1024 * (sets - 1) >= 2 * cache


def test_a_cpu_says_how_large_its_cache_is_or_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.cache_bytes(CPU) >= 0
    monkeypatch.setattr(measure.os, "sysconf_names", {})
    assert measure.cache_bytes(CPU) == 0
    monkeypatch.setattr(measure.os, "sysconf_names", {"SC_LEVEL3_CACHE_SIZE": 0})
    monkeypatch.setattr(measure.os, "sysconf", lambda _: -1)
    assert measure.cache_bytes(CPU) == 0


def test_the_median_is_of_the_runs_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5.0, 1.0, 3.0])
    calls: list[int] = []
    monkeypatch.setattr(measure, "_seconds", lambda work, device: (work(), next(seconds))[1])
    assert measure.median_seconds(lambda: calls.append(0), CPU, 3) == 3.0
    assert len(calls) == 4
