"""The entry of the program: runs a command and turns every way it can end into an exit code.

What this module imports is small, so that signals are heard a moment after Python has started.
"""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from lowmem.cli.errors import tell, tell_bug
from lowmem.errors import ConfigError, HardwareError, LowMemError, nearest, plain
from lowmem.train.guard import stopped_before_it_began

# Of a file, whatever it was wanted for: no bug, and nothing that repeating mends.
_REFUSED = {"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO", "EMFILE", "ENFILE"}


def main() -> NoReturn:
    """The command `lowmem`."""
    code = run(sys.argv[1:])
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):  # none must take the code's place now
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        sys.stderr.flush()
    except OSError:  # nobody reads it; Python would end with 120 for what is left
        _let_go(sys.stderr)
    if any(thread.name == "lowmem checkpoint" for thread in threading.enumerate()):
        # After a second Ctrl-C. Python would end the thread inside torch, which aborts on that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return its exit code."""
    _configure_cuda()
    traced = os.environ.get("LOWMEM_LOG") == "debug" or not {"-v", "--verbose"}.isdisjoint(
        arguments
    )
    try:
        with stopped_before_it_began():
            from lowmem.cli.commands import app  # typer and all signatures: a quarter of a second

            code = app(list(arguments), prog_name="lowmem", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except LowMemError as error:
        _trace(error, traced)
        return tell(error)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader has gone (`lowmem methods | head`): nothing to say, and nobody to say it to.
        _let_go(sys.stdout)
        return 0
    except Exception as error:
        return _foreign(error, arguments, traced)


def _let_go(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _foreign(error: Exception, arguments: Sequence[str], traced: bool) -> int:
    """Tell an exception that is not ours: typer's, or a bug."""
    import typer

    if isinstance(error, typer.Abort):
        return _interrupted()
    # BadParameter -> UsageError -> ClickException: typer exports only the first, and has moved the
    # others between releases.
    if isinstance(error, typer.BadParameter.__mro__[2]):
        return tell(_usage_error(error, arguments))
    _trace(error, traced)
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _REFUSED:
        return tell(_refused(error))
    return tell_bug(error, traced=traced)


def _refused(error: OSError) -> HardwareError:
    """What the system said of a file."""
    return HardwareError(
        f"{error.filename or 'a file'}: {error.strerror}",
        "the system refuses it",
        "make room or give the right to it, or another folder by --out or LOWMEM_HOME",
    )


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def _configure_cuda() -> None:
    """Settings that CUDA reads once, before torch is imported; what the user set stays.

    Expandable segments keep fragmentation below a percent, which the planner counts on; a fixed
    cuBLAS workspace makes products repeat bit for bit.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _trace(error: Exception, traced: bool) -> None:
    if traced:
        traceback.print_exception(error)


def _usage_error(mistake: Any, arguments: Sequence[str]) -> ConfigError:
    """A mistyped command line in three parts, with the nearest option or command."""
    context: Any = getattr(mistake, "ctx", None)
    what, hint = mistake.format_message().rstrip("."), ""
    if what.startswith("No such option"):
        typed = mistake.option_name
        known = [option for parameter in context.command.params for option in parameter.opts]
        what, hint = f"no such option: {typed}", nearest(typed, known)
    elif what.startswith("No such command"):
        typed = what.split("'")[1]
        what, hint = f"no such command: {typed}", nearest(typed, context.command.commands)
    elif what == "Missing command":
        what, hint = "a command is missing", f"allowed: {', '.join(context.command.commands)}"
    path = context.command_path if context else f"lowmem {arguments[0]}"
    return ConfigError(plain(what), hint, f"{path} --help")
