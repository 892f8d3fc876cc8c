"""`lowmem plan`: what fits, and why the rest does not; `--verify` also runs it."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded, planned, require_fit
from lowmem.errors import HardwareError, PlanError
from lowmem.planner.calibration import Row
from lowmem.units import format_bytes


def plan(given: Given, *, verify: bool, as_json: bool) -> None:
    """Print the plan; PlanError (exit 3) after it when nothing fits."""
    console = Console(quiet=given.quiet)
    config = loaded(given, console).config
    if verify:
        _verified(config, console, as_json=as_json)
        return
    result = planned(config, for_this_machine=False)
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
