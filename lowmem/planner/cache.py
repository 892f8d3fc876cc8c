"""Plans that were made before, on disk: the same question is answered without torch.

    key = plan_key(config, card, notes)
    plan = kept_plan(folder, key)               # None: it was never asked, or anything has changed
    keep_plan(folder, key, make_plan(config, card, notes))

A plan is a function of what the key is made of: the settled configuration with its notes and the
model it names, every field of the card, the sources of lowmem and of packages that add methods,
versions, the platform, and the variables that shape memory. FOLDER/KEY.json holds the published
form of the plan and its sha256; a file that is damaged, foreign or of another version is no plan.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config
from lowmem.kernels.native import compiler
from lowmem.planner.plan import Card, Plan

MOST = 200  # files; beyond them the oldest go
PACKAGES = ("torch", "numpy", "pydantic", "bitsandbytes", "triton")
VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
    "LOWMEM_KERNELS",
    "TRITON_INTERPRET",
    "CXX",
)
METHODS_GROUP = "lowmem.methods"  # as optim/methods/third_party.py, whose import needs torch
_SOURCES = (".py", ".toml", ".cpp")
_PACKAGE = Path(__file__).parents[1]


def plan_key(
    config: Config, card: Card, notes: list[str], environ: Mapping[str, str] = os.environ
) -> str:
    """What the plan of these depends on, as 64 hexadecimal digits."""
    model = resolve_model(config.model, Path.cwd())  # a path may hold another model by now
    facts = {
        "config": config.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "notes": notes,
        "card": asdict(card),
        "sources": digest_of(_PACKAGE),
        "packages": {name: _version(name) for name in PACKAGES},
        "methods": list(_foreign_methods()),
        "platform": [sys.platform, platform.machine(), platform.python_version()],
        "compiler": compiler(),
        "variables": {name: environ.get(name) for name in VARIABLES},
    }
    return _sha256(json.dumps(facts).encode())


def kept_plan(folder: Path, key: str) -> Plan | None:
    """The plan that was kept under `key`, None where there is none that can be trusted."""
    try:
        kept = json.loads(_file(folder, key).read_bytes())
        right = kept["sha256"] == _seal(key, kept["plan"])
        return Plan.from_json(kept["plan"]) if right else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep_plan(folder: Path, key: str, plan: Plan) -> None:
    """Write the plan, whole or not at all, and drop the oldest beyond MOST. OSError: cannot."""
    record = plan.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with open(handle, "w", encoding="utf-8") as file:
        json.dump({"sha256": _seal(key, record), "plan": record}, file)
    Path(temporary).replace(_file(folder, key))
    # Half-written files of processes that were killed grow old among the others.
    for old in sorted(folder.iterdir(), key=_written, reverse=True)[MOST:]:
        old.unlink(missing_ok=True)


def digest_of(root: Path) -> str:
    """sha256 of the content and place of every source below a folder, links followed, or a file.

    By content: a time stamp does not tell two edits within one tick apart.
    """
    files = [(root.name, root)] if root.is_file() else sorted(_sources(root))
    listed = [f"{name} {_sha256(path.read_bytes())}\n" for name, path in files]
    return _sha256("".join(listed).encode())


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(place below root, file)."""
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name.endswith(_SOURCES):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _foreign_methods() -> Iterator[list[Any]]:
    """Methods of other packages, with the packages' versions and sources; none is imported."""
    for entry in sorted(entry_points(group=METHODS_GROUP), key=lambda e: (e.name, e.value)):
        spec = find_spec(entry.module.partition(".")[0])
        roots: Iterable[str] = ()
        if spec is not None:
            roots = spec.submodule_search_locations or filter(None, [spec.origin])
        sources = [digest_of(Path(root)) for root in roots]
        yield [entry.name, entry.value, entry.dist and entry.dist.version, sources]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _written(path: Path) -> float:
    """When; the distant past for a file that another process has just dropped."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def _seal(key: str, record: Any) -> str:
    return _sha256((key + json.dumps(record)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
