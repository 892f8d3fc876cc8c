"""`lowmem doctor`: what this machine offers, for its owner and for bug reports."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem import __version__
from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.config.flags import ENVIRONMENT, OTHER_VARIABLES
from lowmem.data.cache import cache_home
from lowmem.errors import ConfigError, HardwareError, nearest
from lowmem.units import format_bytes

_REQUIRED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "pydantic",
    "transformers",
    "bitsandbytes",
)
_OPTIONAL = ("datasets", "pyarrow", "flash-attn", "triton")


@dataclass(frozen=True)
class Check:
    """One line of the report. state: "ok", "note" (works without it) or "broken"."""

    name: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Asked:
    """Which examination: at most one. resume: kills, 0 for none; run: of the report."""

    resume: int = 0
    disk: bool = False
    report: bool = False
    kernels: bool = False
    run: Path | None = None


def doctor(given: Given, asked: Asked, *, as_json: bool) -> None:
    """Print all checks, or the examination that was asked for.

    HardwareError (exit 8) when something required is broken; ConfigError: several examinations.
    """
    chosen = [flag for flag in ("resume", "disk", "report", "kernels") if getattr(asked, flag)]
    if len(chosen) > 1:
        flags = " and ".join(f"--{flag}" for flag in chosen)
        raise ConfigError(f"{flags} at once", "each is an examination of its own", "one of them")
    if asked.run is not None and not asked.report:
        raise ConfigError(f"{asked.run} without --report", "a run is only reported on", "--report")
    if asked.resume:
        from lowmem.cli.doctor_resume import doctor_resume

        doctor_resume(given, asked.resume, as_json=as_json)
    elif asked.disk:
        from lowmem.cli.doctor_disk import doctor_disk

        doctor_disk(given, as_json=as_json)
    elif asked.kernels:
        from lowmem.cli.kernels import doctor_kernels

        doctor_kernels(given, as_json=as_json)
    elif asked.report:
        from lowmem.cli.doctor_report import doctor_report

        doctor_report(given, asked.run, as_json=as_json)
    else:
        _checks(given, as_json=as_json)


def _checks(given: Given, *, as_json: bool) -> None:
    console = Console(quiet=given.quiet)
    checks = list(examine(os.environ))
    if as_json:
        console.json({"schema_version": 1, "checks": [asdict(check) for check in checks]})
    else:
        marks = {"ok": "ok", "note": "-", "broken": "!!"}
        rows = [[marks[c.state], c.name, c.text + (c.fix and f"; {c.fix}")] for c in checks]
        console.table(["", "", ""], rows)
    broken = [check for check in checks if check.state == "broken"]
    if broken:
        raise HardwareError(
            f"broken: {', '.join(check.name for check in broken)}",
            "\n".join(f"{check.name}: {check.text}" for check in broken),
            "\n".join(check.fix for check in broken if check.fix),
        )


def examine(environ: Mapping[str, str]) -> Iterator[Check]:
    """Every check, in the order of the report."""
    yield Check(
        "lowmem", "ok", f"{__version__}, Python {platform.python_version()}, {sys.platform}"
    )
    yield from (_package(name, required=True) for name in _REQUIRED)
    yield from (_package(name, required=False) for name in _OPTIONAL)
    yield from _device()
    yield _cores_and_memory()
    yield _cache(cache_home())
    yield from _variables(environ)


def _package(name: str, *, required: bool) -> Check:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if required:
            return Check(name, "broken", "not installed", "pip install lowmem")
        return Check(name, "note", "not installed, optional")
    return Check(name, "ok", version)


def _device() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return  # reported with the packages
    import torch

    if not torch.cuda.is_available():
        yield Check("device", "note", "no CUDA device: training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        total = format_bytes(facts.total_memory)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        capability = f"compute {facts.major}.{facts.minor}"
        yield Check(f"cuda:{index}", "ok", f"{facts.name}, {total}, {capability}, {half}")


def _cores_and_memory() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("host", "ok", f"{cores} cores, {format_bytes(memory)}")


def _cache(folder: Path) -> Check:
    """Whether the cache can be written, and how much fits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = error.strerror or str(error)
        return Check(
            "cache", "broken", f"{folder}: {reason}", "set LOWMEM_HOME to a folder of yours"
        )
    return Check("cache", "ok", f"{folder}, {format_bytes(free)} free")


def _variables(environ: Mapping[str, str]) -> Iterator[Check]:
    known = [*ENVIRONMENT, *OTHER_VARIABLES]
    for name in sorted(environ):
        if name.startswith("LOWMEM_"):
            hint = "" if name in known else nearest(name, known)
            yield Check(name, "ok" if name in known else "note", environ[name], hint)
