"""Errors: scripts may rely on their exit codes, people on their three parts."""

from pathlib import Path

import pytest

from lowmem import errors
from lowmem.errors import LowMemError, command_line, nearest, short, short_path

EXIT_CODES = {
    "LowMemError": 1,
    "ConfigError": 2,
    "PlanError": 3,
    "DataError": 4,
    "CheckpointError": 5,
    "DivergedError": 6,
    "OutOfMemoryError": 7,
    "HardwareError": 8,
    "Stopped": 75,  # EX_TEMPFAIL: try again
}


def test_exit_codes_are_those_that_scripts_know() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert {c.__name__: c.exit_code for c in classes if issubclass(c, LowMemError)} == EXIT_CODES


def test_an_error_keeps_its_three_parts() -> None:
    error = LowMemError("what", "why", "fix")
    assert (str(error), error.what, error.why, error.fix) == ("what", "what", "why", "fix")


def test_a_shown_command_can_be_pasted() -> None:
    assert command_line("resume", Path("runs/a")) == "lowmem resume runs/a"
    assert command_line("eval", Path("my runs/a b")) == "lowmem eval 'my runs/a b'"


def test_what_is_long_keeps_both_ends_and_a_usual_path_all_of_it() -> None:
    told = short("begin" + "x" * 200 + "\x1b" + "y" * 10 + "end")
    assert told.startswith("beginxxx")
    assert told.endswith("x\\x1byyyyyyyyyyend (219 characters)")
    assert len(told) < 90
    path = Path("/home/somebody") / ("a folder of a long name/" * 9) / "text.jsonl"
    assert short_path(path) == str(path)
    longer = path / ("z" * 200)
    assert short_path(longer).endswith(f"zz ({len(str(longer))} characters)")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("galor", "did you mean `galore`?"),
        ("adamv", "did you mean `adamw`?"),
        ("galore", "did you mean `galore`?"),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_the_nearest_word_or_none(word: str, hint: str) -> None:
    assert nearest(word, ["adamw", "adam8bit", "galore"]) == hint


def test_nothing_is_near_to_nothing() -> None:
    assert nearest("galore", []) == ""
