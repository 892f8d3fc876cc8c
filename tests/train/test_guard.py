"""Signals and files in the run folder become requests."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from lowmem.errors import Stopped
from lowmem.train.guard import StopRequest, stop_requests, stopped_before_it_began

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


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


def test_nohup_is_obeyed() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopped_before_it_began(), stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop


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


def test_the_file_stop_is_a_request_and_is_consumed(tmp_path: Path) -> None:
    with stop_requests(tmp_path) as stop:
        assert not stop
        (tmp_path / "STOP").touch()
        assert stop
        assert stop.signal == "STOP"
        assert not (tmp_path / "STOP").exists()
        assert stop  # for good
    with stop_requests(tmp_path) as stop:
        assert not stop


def test_the_file_save_asks_once(tmp_path: Path) -> None:
    with stop_requests(tmp_path) as stop:
        (tmp_path / "SAVE").touch()
        assert stop.save_asked()
        assert not stop.save_asked()
        assert not stop


def test_a_wait_ends_early_when_the_run_is_asked_to_stop(tmp_path: Path) -> None:
    with stop_requests(tmp_path) as stop:
        assert not stop.wait(0.0)
        (tmp_path / "STOP").touch()
        assert stop.wait(1000.0)


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_before_a_run_has_begun_a_signal_ends_it_with_a_word(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=number.name) as caught, stopped_before_it_began():
        signal.raise_signal(number)
    assert caught.value.exit_code == 75


def test_a_signal_in_an_import_is_neither_swallowed_nor_renamed() -> None:
    """What third parties import is tried with `except Exception`; Python renames errors, too."""

    class Raising:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM"), stopped_before_it_began():
        _as_if_optional()
    with pytest.raises(Stopped, match="SIGTERM"), stopped_before_it_began():
        type("Owner", (), {"attribute": Raising()})  # RuntimeError: Error calling __set_name__


def _as_if_optional() -> None:
    with suppress(Exception):
        signal.raise_signal(signal.SIGTERM)
