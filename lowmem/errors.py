"""Every error that a user can meet: what happened, why, and what to do, with its exit code.

Library misuse by programmers stays `ValueError` or `TypeError`; only `cli/errors.py` prints these.
"""

import difflib
import shlex
from collections.abc import Iterable

_LONGEST_WORD = 100  # to look for neighbours of; the search takes quadratic time


class LowMemError(Exception):
    """An error that is told to the user in three parts.

    what: one line that names the offending value. why: the reason or the allowed values.
    fix: the command or the change that helps.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix


class ConfigError(LowMemError):
    """A wrong flag, key, value or combination of them."""

    exit_code = 2


class PlanError(LowMemError):
    """The run does not fit the memory that was given."""

    exit_code = 3


class DataError(LowMemError):
    """Missing, corrupt or unsuitable text, shards or tokenizer."""

    exit_code = 4


class CheckpointError(LowMemError):
    """A checkpoint or run folder that is missing, damaged or belongs to another run."""

    exit_code = 5


class DivergedError(LowMemError):
    """The loss or the gradient stopped being finite."""

    exit_code = 6


class OutOfMemoryError(LowMemError):
    """The device ran out of memory although the plan fitted."""

    exit_code = 7


class HardwareError(LowMemError):
    """A device, driver or optional package that is missing or not supported."""

    exit_code = 8


class Stopped(LowMemError):
    """The run was asked to stop, has saved, and can be resumed."""

    exit_code = 75


def short(text: str, most: int = 80) -> str:
    """`text` on one line of at most about `most` characters, what a terminal obeys spelled out."""
    if len(text) <= most:
        return _spelled_out(text)
    half = (most - 20) // 2
    ends = (_spelled_out(end) for end in (text[:half], text[-half:]))
    return f"{'...'.join(ends)} ({len(text):,} characters)"


def short_path(path: object) -> str:
    """As `short`, but whole at any usual length: the end of a path is what tells."""
    return short(str(path), 300)


def _spelled_out(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def command_line(*words: object) -> str:
    """The command of lowmem that a user can paste: paths with blanks are quoted."""
    return shlex.join(["lowmem", *map(str, words)])


def plain(message: str) -> str:
    """A sentence of pydantic's or typer's in our words."""
    message = message.replace("Input should be", "must be").removeprefix("Value error, ")
    return message.partition(", unable")[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint "did you mean `x`?", or an empty string when nothing is near."""
    if len(word) > _LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""
