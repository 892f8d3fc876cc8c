"""`lowmem doctor --disk`: how fast runs can be saved here, and whether there is room for them."""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded
from lowmem.errors import HardwareError
from lowmem.units import MIB, format_bytes, format_seconds

_WRITTEN = 256 * MIB
_PIECE = 4 * MIB
_SMALL_WRITES = 20


@dataclass(frozen=True)
class Disk:
    """What a folder's disk does. bytes_per_second: written and synced; sync_seconds: of 4 KiB."""

    folder: str
    bytes_per_second: float
    sync_seconds: float
    free: int


@dataclass(frozen=True)
class Need:
    """What the checkpoints of a model take there. seconds: to write one."""

    model: str
    checkpoint: int
    together: int
    seconds: float
    fits: bool


def doctor_disk(given: Given, *, as_json: bool) -> None:
    """Measure the disk of --out; with --model or --config also what that run's checkpoints need."""
    console = Console(quiet=given.quiet)
    config = loaded(given, console).config
    disk = measured(Path(config.run.out))
    need = None
    if config.model != "auto":
        from lowmem.cli.settings import planned
        from lowmem.train.build import declared_bytes
        from lowmem.train.disk import most_at_once

        plan = planned(config, for_this_machine=False)
        one = declared_bytes(plan.config)
        together = one * most_at_once(plan.config)
        name = config.model if isinstance(config.model, str) else "the model"
        need = Need(name, one, together, one / disk.bytes_per_second, together <= disk.free)
    if as_json:
        console.json(
            {"schema_version": 1, "disk": asdict(disk), "need": asdict(need) if need else None}
        )
        return
    rows = [
        ["folder", disk.folder],
        ["writes", f"{format_bytes(disk.bytes_per_second)}/s, synced"],
        ["sync", f"{format_seconds(disk.sync_seconds)} for a small file and its name"],
        ["free", format_bytes(disk.free)],
    ]
    if need is not None:
        verdict = "fits" if need.fits else "does not fit"
        rows += [
            [
                need.model,
                f"{format_bytes(need.checkpoint)} a checkpoint, {format_seconds(need.seconds)}",
            ],
            ["", f"{format_bytes(need.together)} at most together: {verdict}"],
        ]
    console.table(["", ""], rows)


def measured(out: Path) -> Disk:
    """Write and remove a file of 256 MiB. HardwareError: the folder cannot be written."""
    whole = out.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryDirectory(dir=there, prefix=".lowmem-") as folder:
            rate = _bytes_per_second(Path(folder) / "large", min(_WRITTEN, free // 4))
            sync = statistics.median(
                _seconds_of_small(Path(folder) / f"small-{n}") for n in range(_SMALL_WRITES)
            )
    except OSError as error:
        raise HardwareError(
            f"{there} cannot be written: {error.strerror or error}",
            "runs are kept there",
            "--out with a folder of yours",
        ) from None
    return Disk(str(there), rate, sync, free)


def _bytes_per_second(path: Path, size: int) -> float:
    piece = os.urandom(_PIECE)  # zeros are not written by every file system
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, size // _PIECE)):
            file.write(piece)
        os.fsync(file.fileno())
    return max(1, size // _PIECE) * _PIECE / (time.perf_counter() - began)


def _seconds_of_small(path: Path) -> float:
    """What `latest` costs: a small file written, synced, renamed, the folder synced."""
    from lowmem.data.cache import write_whole

    began = time.perf_counter()
    write_whole(path, bytes(4096))
    return time.perf_counter() - began
