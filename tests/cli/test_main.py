"""Commands as users type them: help, streams, exit codes and the three parts of an error."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from lowmem import __version__
from lowmem.cli.commands import app
from lowmem.cli.errors import EXIT_CODES
from lowmem.cli.main import run
from lowmem.errors import CheckpointError, LowMemError, Stopped

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *[[name] for name in ("plan", "train", "resume", "eval", "export", "sample", "methods")],
    *[[name] for name in ("sweep", "compare", "plot", "report", "reproduce", "results", "doctor")],
    ["bench"],
    ["bench", "kernels"],
    ["bench", "optimizer"],
    ["data"],
    ["data", "prepare"],
    ["data", "info"],
    ["data", "verify"],
    ["config"],
    ["config", "show"],
    ["config", "check"],
    ["config", "schema"],
]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let every command end with `error`."""

    def raising(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    monkeypatch.setattr("lowmem.cli.commands.app", raising)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"lowmem {' '.join(command)}" in text
    assert "\b" not in text


def test_help_keeps_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", "--help"]) == 0
    assert "lowmem[plot]" in capsys.readouterr().out


def test_commands_offer_the_switches_that_act_there() -> None:
    def options(*path: str) -> set[str]:
        command: Any = typer.main.get_command(app)
        for name in path:
            command = command.commands[name]
        return {option for parameter in command.params for option in parameter.opts}

    switches = {"--skip-bad", "--compile"}
    assert switches <= options("train")
    assert not switches & options("doctor")
    assert not switches & options("bench", "optimizer")


def test_the_list_of_commands_above_is_complete() -> None:
    def paths(group: Any, *path: str) -> list[list[str]]:
        found = [[*path, name] for name in group.commands]
        for name, command in group.commands.items():
            found += paths(command, *path, name) if hasattr(command, "commands") else []
        return found

    assert sorted(paths(typer.main.get_command(app))) == sorted(COMMANDS)


def test_help_lists_the_exit_codes_and_needs_no_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{code} {meaning}" in text for code, meaning in EXIT_CODES.items())


def test_help_of_every_command_imports_neither_torch_nor_pydantic_models() -> None:
    commands = [[], *COMMANDS]
    code = (
        "import sys\n"
        "from lowmem.cli.main import run\n"
        f"for command in {commands!r}: assert run([*command, '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'lowmem.config.schema'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_lowmem_is_the_command() -> None:
    command = [sys.executable, "-m", "lowmem", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lowmem {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["trian"], "no such command: trian", "did you mean `train`?"),
        (["train", "--mdoel", "x"], "no such option: --mdoel", "did you mean `--model`?"),
        (["plan", "--model"], "'--model' requires an argument", "lowmem plan --help"),
        (["data", "prepar"], "no such command: prepar", "did you mean `prepare`?"),
        (["sample"], "Missing argument 'PATH'", "lowmem sample --help"),
        (["sample", "x", "--tokens", "y"], "'--tokens': must be a valid integer", "--help"),
        (["methods", "a", "b"], "unexpected extra argument", "lowmem methods --help"),
        (["data"], "a command is missing", "allowed: prepare, info, verify"),
    ],
)
def test_a_mistyped_line_is_told_in_three_parts(
    arguments: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert what in err
    assert hint in err
    assert "  fix: lowmem" in err
    assert "Traceback" not in err


def test_an_error_prints_what_why_fix_and_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, CheckpointError("bad file", "reason 1\nreason 2", "do this\nor that"))
    assert run(["doctor"]) == 5
    expected = "error: bad file (exit 5)\n  reason 1\n  reason 2\n  fix: do this\n       or that\n"
    assert capsys.readouterr() == ("", expected)


def test_an_orderly_stop_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, Stopped("saved at update 3", "", "lowmem resume runs/a"))
    assert run(["train"]) == 75
    assert capsys.readouterr().err.startswith("stopped: saved at update 3 (exit 75)")


def test_what_the_system_refuses_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, OSError(errno.EROFS, "Read-only file system", "cache/x"))
    assert run(["doctor"]) == 8
    err = capsys.readouterr().err
    assert err.startswith("error: cache/x: Read-only file system (exit 8)\n")
    assert "\n  fix: " in err


def test_a_signal_after_the_end_leaves_the_exit_code() -> None:
    code = (
        "import atexit, os, signal\n"
        "from lowmem.cli import main\n"
        "main.run = lambda arguments: 75\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "main.main()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 75


@pytest.mark.parametrize("trace", [["-v"], ["--verbose"], []])
def test_a_bug_shows_its_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trace: list[str]
) -> None:
    monkeypatch.delenv("LOWMEM_LOG", raising=False)
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    assert run(["doctor", *trace]) == 1
    err = capsys.readouterr().err
    assert "error: bug: ZeroDivisionError: by zero (exit 1)" in err
    assert "test_main.py:" in err
    assert ("Traceback" in err) == bool(trace)


def test_the_environment_can_ask_for_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_LOG", "debug")
    fail_with(monkeypatch, CheckpointError("bad file"))
    assert run(["doctor"]) == 5
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lowmem", "config", "schema"]
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # typer ends a broken pipe with 1, also quietly


def test_every_error_class_has_a_documented_exit_code() -> None:
    codes = {error.exit_code for error in LowMemError.__subclasses__()}
    assert codes | {0, 1, 130} == set(EXIT_CODES)


@pytest.mark.parametrize("module", ["typer", "pydantic"])
def test_a_signal_while_the_program_is_still_loading_ends_it_with_a_word(module: str) -> None:
    code = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from lowmem.cli.main import run\n"
        "sys.exit(run(['config', 'show']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.startswith("stopped: stopped by SIGTERM; no update was under way (exit 75)")
