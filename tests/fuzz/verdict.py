"""What is allowed to happen with bad input: an error of lowmem's, in three parts, and nothing else.

    with watched("case 17 of seed 0", failures): ...

A case may end well or with a LowMemError that says what, and how to help. Any other exception, an
error without help, more than SECONDS or more than MEMORY is a failure, kept with its traceback.
"""

import contextlib
import io
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from lowmem.cli.errors import tell
from lowmem.errors import LowMemError
from lowmem.units import KIB, MIB

SECONDS = 1.0  # of processor time, so that a busy machine fails nothing
FOREVER = 20  # seconds of wall time
MEMORY = 200 * MIB  # by which the process may grow
LONGEST_REPORT = 20_000  # characters


@dataclass
class Tally:
    """Counts of how cases ended, and what must not have happened."""

    fine: int = 0
    refused: dict[int, int] = field(default_factory=dict)  # exit code -> cases
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.fine + sum(self.refused.values()) + len(self.failures)

    def line(self) -> str:
        codes = ", ".join(f"exit {code}: {count:,}" for code, count in sorted(self.refused.items()))
        return f"{self.cases:,} cases; fine: {self.fine:,}; {codes}; failed: {len(self.failures)}"

    def run(self, name: str, case: Callable[[], object]) -> None:
        """Run one case and note how it ends. name: what repeats it."""
        code = 0
        before, began = _peak(), time.process_time()
        try:
            with _alarm():
                case()
        except LowMemError as error:
            problem, code = _unfit(error), error.exit_code
        except BaseException as error:  # PyO3's panics are no Exception
            if isinstance(error, (KeyboardInterrupt, MemoryError)):
                raise
            problem = "".join(traceback.format_exception(error, limit=-8))[-3000:]
        else:
            problem = None
        seconds, growth = time.process_time() - began, _peak() - before
        if problem is None and seconds > SECONDS:
            problem = f"took {seconds:.1f} s"
        if problem is None and growth > MEMORY:
            problem = f"took {growth / MIB:.0f} MiB"
        if problem is not None:
            self.failures.append(f"{name}: {problem}")
        elif code:
            self.refused[code] = self.refused.get(code, 0) + 1
        else:
            self.fine += 1


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """TimeoutError in the middle of a case that would take forever."""

    def ring(*_: object) -> NoReturn:
        raise TimeoutError(f"took more than {FOREVER} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(FOREVER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def _unfit(error: LowMemError) -> str | None:
    """Why an error does not help, None if it does."""
    report = io.StringIO()
    with contextlib.redirect_stderr(report):
        code = tell(error)
    text = report.getvalue()
    if code in (0, 1):
        return f"exit code {code}: {text[:500]}"
    if not error.what.strip() or not error.fix.strip():
        return f"does not say what, or how to help: {text[:500]!r}"
    if len(text) > LONGEST_REPORT:
        return f"a report of {len(text)} characters: {text[:500]!r}"
    strange = {letter for letter in text if not letter.isprintable() and letter != "\n"}
    if strange:
        return f"unprintable {strange!r} in {text[:500]!r}"
    if "pydantic" in text or "Input should be" in text:
        return f"a validator's jargon: {text[:500]!r}"
    return None
