"""Errors as a user reads them: what, why, fix on stderr, and the exit code.

error: run folder runs/a exists (exit 2)
  it holds a run of yesterday
  fix: lowmem resume runs/a
"""

import sys
import traceback
from contextlib import suppress

from lowmem.errors import LowMemError, short

_MOST_LINES = 40
_LONGEST_LINE = 600  # characters; more comes from damaged input, not from us

EXIT_CODES = {
    0: "ok",
    1: "bug",
    2: "usage or configuration",
    3: "plan does not fit",
    4: "data",
    5: "checkpoint",
    6: "diverged",
    7: "out of memory",
    8: "hardware or dependency",
    75: "stopped, can be resumed",
    130: "interrupted",
}


def tell(error: LowMemError) -> int:
    """Print the error's three parts; return its exit code."""
    why, fix = error.why.splitlines(), error.fix.splitlines()
    word = "stopped" if error.exit_code == 75 else "error"
    lines = [f"{word}: {error.what} (exit {error.exit_code})"]
    lines += [f"  {line}" for line in why[:_MOST_LINES]]
    lines += [f"  and {len(why) - _MOST_LINES:,} more lines"] if len(why) > _MOST_LINES else []
    first, *more = fix or [""]
    lines += [f"  fix: {first}"] if first else []
    lines += [f"       {line}" for line in more[:_MOST_LINES]]
    with suppress(OSError):  # nobody is there to read it
        print("\n".join(short(line, _LONGEST_LINE) for line in lines), file=sys.stderr, flush=True)
    return error.exit_code


def tell_bug(error: Exception, *, traced: bool) -> int:
    """An exception that nobody foresaw: what it was and how to report it. Exit code 1."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}:{frame.lineno}"
    summary = f"{type(error).__name__}: {error}".partition("\n")[0]
    fix = "please report the traceback above" if traced else "repeat with -v for the traceback"
    bug = LowMemError(f"bug: {summary}", f"at {place}", f"{fix}, with `lowmem doctor`")
    return tell(bug)
