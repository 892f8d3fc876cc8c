"""Signals become requests, and numbers that are not finite become an error that says when."""

import math
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from lowmem.errors import DivergedError
from lowmem.train.guard import StopRequest, require_finite, stop_requests

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def _survive() -> Iterator[None]:
    """A signal that the guard lets through fails its test instead of ending pytest."""

    def reached(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"signal {number} was not caught")

    before = {number: signal.signal(number, reached) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_that_names_it(number: signal.Signals) -> None:
    with stop_requests() as stop:
        assert not stop
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop
        assert stop.signal == number.name


@pytest.mark.parametrize("first", SIGNALS)
def test_an_interrupt_after_a_request_interrupts_at_once(first: signal.Signals) -> None:
    with stop_requests() as stop:
        signal.raise_signal(first)
        assert stop.signal == first.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_scheduler_may_repeat_its_signal() -> None:
    """Some send SIGTERM every few seconds; the update must still be finished and saved."""
    with stop_requests() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == "SIGTERM"


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_handlers_are_as_before_however_the_run_ends(error: type[BaseException] | None) -> None:
    before = handlers()
    if error is None:
        with stop_requests():
            assert handlers() != before
    else:
        with pytest.raises(error), stop_requests():
            raise error
    assert handlers() == before


def test_an_outer_request_hears_nothing_of_an_inner_one() -> None:
    with stop_requests() as outer:
        with stop_requests() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner
        assert not outer
        signal.raise_signal(signal.SIGTERM)
        assert outer


def test_in_another_thread_requests_never_come() -> None:
    def inside() -> StopRequest:
        with stop_requests() as stop:
            assert handlers() == before
            return stop

    before = handlers()
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(inside).result()
    assert handlers() == before


def test_finite_numbers_pass() -> None:
    require_finite(0, 11.5, 0.0, "unfused")


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize(
    ("mode", "made"),
    [
        ("unfused", "the update was not made"),
        ("fused+subspace", "the update was not made"),
        ("fused", "weights changed during backward"),
    ],
)
def test_a_number_that_is_not_finite_is_told_with_its_update(
    loss: float, norm: float, mode: str, made: str
) -> None:
    with pytest.raises(DivergedError, match=f"update 17: loss {loss}, gradient norm {norm}") as e:
        require_finite(17, loss, norm, mode)
    assert made in e.value.why
    assert "a new run" in e.value.fix
