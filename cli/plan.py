"""`lowmem plan`: what fits, and why the rest does not; `--verify` also runs it."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.cli import explain
from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded, planned, require_fit
from lowmem.config.schema import Config
from lowmem.errors import ConfigError, HardwareError, PlanError
from lowmem.planner.calibration import Row
from lowmem.planner.plan import json_schema
from lowmem.units import format_bytes


@dataclass(frozen=True)
class Asked:
    """What is wanted beside the plan itself.

    verify: run it. why: explain this method instead. compare: a list of cards, instead of one.
    reuse: a plan that was made before may answer.
    """

    verify: bool = False
    why: str | None = None
    compare: str | None = None
    reuse: bool = True


def plan(given: Given, asked: Asked, *, as_json: bool) -> None:
    """Print the plan; PlanError (exit 3) after it when nothing fits."""
    _check(given, asked)
    console = Console(quiet=given.quiet, verbose=given.verbose)
    config = loaded(given, console).config
    if asked.verify:
        _verified(config, console, as_json=as_json)
    elif asked.why is not None:
        explain.why(config, asked.why, console, reuse=asked.reuse, as_json=as_json)
    elif asked.compare is not None:
        explain.compare(config, asked.compare, console, reuse=asked.reuse, as_json=as_json)
    else:
        _planned(config, console, reuse=asked.reuse, as_json=as_json)


def _check(given: Given, asked: Asked) -> None:
    """ConfigError for questions that exclude one another."""
    flags = {"--compare": asked.compare, "--why": asked.why, "--verify": asked.verify or None}
    together = [flag for flag, value in flags.items() if value is not None]
    if asked.compare is not None and "gpu" in given.flags:
        together.append("--gpu")
    if len(together) > 1:
        raise ConfigError(
            f"{together[0]} and {together[1]} exclude one another",
            "--compare plans for each of its cards, --why and --verify for one",
            f"leave out {together[1]}, or {together[0]}",
        )


def _planned(config: Config, console: Console, *, reuse: bool, as_json: bool) -> None:
    result = planned(config, for_this_machine=False, reuse=reuse)
    if as_json:
        console.json(result.to_json())
    else:
        console.plan(result, as_result=True)
    require_fit(result)


def _verified(config: Any, console: Console, *, as_json: bool) -> None:
    """Run the plan on this machine; HardwareError (exit 8) where it did not keep its promise."""
    from lowmem.planner.hardware import SmiReading

    before = SmiReading.all()  # planning for a CUDA device makes our context there
    result = planned(config, for_this_machine=True)
    if not as_json:
        console.plan(result, as_result=True)
    require_fit(result)
    from lowmem.train.verify import UPDATES, verify

    console.say(f"\nRunning {UPDATES} updates, an evaluation and a save")
    verification = verify(result, before, shlex.join(["lowmem", *sys.argv[1:]]))
    kept = _kept(verification.calibration)
    if as_json:
        rows = [
            {**asdict(row), "error": row.error, "right": row.is_right} for row in verification.rows
        ]
        told = {"right": verification.is_right, "note": verification.note, "file": str(kept)}
        console.json({**result.to_json(), "verification": {**told, "rows": rows}})
    else:
        console.result("\nPlanned and measured")
        console.verification(verification.rows)
        if verification.note:
            console.result(verification.note)
        if verification.is_right:
            console.result("Verdict: the plan is right within 2 %, never more than 1 % too little")
        console.result(f"Kept in {kept}")
    if not verification.is_right:
        raise _wrong([row for row in verification.rows if not row.is_right])


def _kept(calibration: Any) -> Path:
    try:
        path: Path = calibration.write()
    except OSError as error:
        raise HardwareError(
            f"{error.filename} cannot be written",
            str(error),
            "point LOWMEM_HOME at a folder of yours",
        ) from None
    return path


def _wrong(rows: list[Row]) -> PlanError | HardwareError:
    lines = [
        f"{row.segment}, {row.what}: {format_bytes(row.measured or 0)} measured,"
        f" {format_bytes(row.planned)} planned"
        for row in rows
    ]
    if any(row.what == "device" for row in rows):
        return PlanError(
            "the plan does not fit: measured on this machine", "\n".join(lines), "a larger --gpu"
        )
    return HardwareError(
        f"the plan is wrong on this machine in {len(rows)} of its numbers",
        "\n".join(["a plan promises to be within 2 %, never more than 1 % too little", *lines]),
        "please report this table, with `lowmem doctor`; constants that were measured are kept,"
        " so plan again",
    )


def schema(given: Given) -> None:
    """The JSON schema of --json on stdout."""
    Console(quiet=given.quiet).json(json_schema())
