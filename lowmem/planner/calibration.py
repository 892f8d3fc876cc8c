"""What was measured on a card, kept for the next plan: `LOWMEM_HOME/cards/*.json`.

    Calibration(name="NVIDIA GeForce RTX 4090", ...).write()     # lowmem plan --verify
    find(lambda kept: kept.uuid == uuid)                         # the newest that applies

A file belongs to a card, its driver and the version of torch; another driver or torch does not use
it. Only constants are taken from it: the context, what cuBLAS holds, and rates. Bytes that a
rehearsal counts are never scaled. Files that cannot be read or do not fit are named and left alone.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowmem.data.cache import cache_home, write_whole
from lowmem.units import GIB

SCHEMA_VERSION = 1
ALLOWED_OVER, ALLOWED_UNDER = 0.02, 0.01
"""A plan is right where measured lies between 2 % below and 1 % above it."""


@dataclass(frozen=True)
class Row:
    """One comparison, in bytes. measured: None where this machine cannot measure it.

    segment: when. what: "tensors", "allocated", "reserved", "device" or a part of the memory.
    is_promise: the plan answers for this number.
    """

    segment: str
    what: str
    planned: int
    measured: int | None
    is_promise: bool = True

    @property
    def error(self) -> float | None:
        """Of the measurement against the plan: +0.01 where the plan promised 1 % too little."""
        if self.measured is None:
            return None
        if self.planned == 0:
            return 0.0 if self.measured == 0 else float("inf")
        return self.measured / self.planned - 1

    @property
    def is_right(self) -> bool:
        """Within 2 %, not more than 1 % too little; also what is no promise or not measured."""
        if self.measured is None or not self.is_promise:
            return True
        more = self.measured - self.planned
        return -ALLOWED_OVER * self.planned <= more <= ALLOWED_UNDER * self.planned


class Calibration(BaseModel):
    """The content of a file. context, workspace: bytes; None where not measured.

    tflops, bandwidth (GB/s): what products and passes over large tensors reached.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")
    lowmem: str
    torch: str
    driver: str
    name: str = Field(min_length=1)
    uuid: str | None = None
    total: int = Field(gt=0, le=1024 * GIB)
    context: int | None = Field(default=None, ge=0, le=8 * GIB)
    workspace: int | None = Field(default=None, ge=0, le=GIB)
    tflops: float | None = Field(default=None, gt=0, le=100_000)
    bandwidth: float | None = Field(default=None, gt=0, le=100_000)
    command: str = ""
    rows: list[dict[str, str | int | None]] = Field(default_factory=list)

    def path(self) -> Path:
        """Where it is kept: one file per card, driver and torch."""
        return (
            folder()
            / f"{_word(self.uuid or self.name)}-{_word(self.driver)}-{_word(self.torch)}.json"
        )

    def write(self) -> Path:
        """Keep it, whole or not at all; OSError where the folder cannot be written."""
        path = self.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())
        return path


def now() -> str:
    """The time as it stands in a file."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def folder() -> Path:
    return cache_home() / "cards"


@dataclass
class Found:
    """The calibration that applies, with its file; warnings name those that were ignored."""

    calibration: Calibration | None = None
    path: Path | None = None
    warnings: list[str] = field(default_factory=list)


def find(is_meant: Callable[[Calibration], bool]) -> Found:
    """The newest calibration for which `is_meant`, made with the torch that is installed."""
    found = Found()
    for path in sorted(folder().glob("*.json")) if folder().is_dir() else []:
        try:
            read = Calibration.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            found.warnings.append(f"{path} is no calibration and was ignored: {_reason(error)}")
            continue
        if path.name != read.path().name:
            found.warnings.append(
                f"{path} was ignored: it says of itself that it is {read.path().name}"
            )
            continue
        if not is_meant(read) or read.torch != version("torch"):
            continue
        if found.calibration is None or read.date > found.calibration.date:
            found.calibration, found.path = read, path
    return found


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]
    return error.strerror or str(error)


def _word(text: str) -> str:
    """Safe as part of a file's name."""
    return re.sub("[^A-Za-z0-9.+_]+", "_", text)
