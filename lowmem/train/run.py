"""The run directory: what was asked, what was planned, what happened, and where it stands.

runs/NAME/  config.toml  plan.json  env.json  metrics.jsonl  events.jsonl  checkpoints/  latest
"""

import json
import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowmem import __version__
from lowmem.config.load import load
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config
from lowmem.config.toml import to_toml
from lowmem.data.cache import write_whole
from lowmem.errors import CheckpointError, ConfigError, command_line, short_path
from lowmem.planner.plan import Plan
from lowmem.train.events import Event, Metric, to_record
from lowmem.train.lock import held

MANIFEST = "manifest.json"  # written last: a folder with it is a whole checkpoint
REPLACED = ".tmp-old-"  # before the name of a checkpoint while another takes its place
METRICS, EVENTS, LATEST = "metrics.jsonl", "events.jsonl", "latest"
RESERVED = ("sample", "c4", "auto")  # words of --data and --tokenizer that are no paths
_STEP = re.compile("step-([0-9]{1,15})")
_PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """An existing run folder. start: the checkpoint to continue from instead of the newest."""

    folder: Path
    config: Config
    start: Path | None = None

    @staticmethod
    def create(config: Config, plan: dict[str, Any] | None) -> "Run":
        """Make the folder of a new run; ConfigError if it exists, and nothing is touched then."""
        folder = Path(config.run.out) / (config.run.name or _free_name(config))
        config = _self_contained(config, folder.name)
        env = json.dumps(environment(), indent=1)
        try:
            folder.mkdir(parents=True)
            (folder / "checkpoints").mkdir()
            (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
            if plan is not None:
                (folder / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
            (folder / "env.json").write_text(env, encoding="utf-8")
        except FileExistsError:
            raise _taken(folder) from None
        except OSError as error:
            raise ConfigError(
                f"the run folder {folder} cannot be made",
                str(error),
                "--out with a writable folder",
            ) from None
        return Run(folder, config)

    @staticmethod
    def open(path: Path) -> "Run":
        """The run at `path`, a run folder or one of its checkpoints. CheckpointError otherwise."""
        folder, start, whole = path, None, path.resolve()
        if whole.parent.name == "checkpoints":
            folder, start = whole.parent.parent, whole
        if not os.path.isfile(folder / "config.toml"):  # pathlib raises where a name is too long
            raise CheckpointError(
                f"{short_path(path)} "
                + ("is no run" if os.path.exists(path) else "does not exist"),
                "expected a folder with config.toml, as `lowmem train` makes it",
                "ls runs",
            )
        return Run(folder, load({}, [folder / "config.toml"], environ={}).config, start)

    def plan(self) -> Plan | None:
        """What was planned when the run began, None where nothing was or it cannot be read."""
        try:
            record = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
            return replace(Plan.from_json(record), config=self.config)
        except (OSError, ValueError, RecursionError):
            return None

    def write_config(self, config: Config, plan: dict[str, Any]) -> None:
        """Make these the configuration and plan of the run from now on.

        What config.toml was becomes config-1.toml, config-2.toml, ...
        """
        path = self.folder / "config.toml"
        with held(self.folder):
            number = 1 + len(list(self.folder.glob("config-*.toml")))
            write_whole(self.folder / f"config-{number}.toml", path.read_bytes())
            write_whole(self.folder / "plan.json", json.dumps(plan, indent=1).encode())
            write_whole(path, to_toml(config).encode())

    @property
    def was_changed(self) -> bool:
        """Has `write_config` changed it? Otherwise a checkpoint of other settings is a mistake."""
        return any(self.folder.glob("config-*.toml"))

    def latest(self) -> Path:
        """The checkpoint to read: `start`, or the newest complete one. CheckpointError if none."""
        if self.start is not None:
            if self.start.is_dir():
                return self.start
            raise CheckpointError(
                f"{self.start} does not exist",
                "complete checkpoints are folders step-NUMBER",
                f"ls {self.start.parent}",
            )
        newest = self._newest()
        if newest is None:
            config = self.folder / "config.toml"
            raise CheckpointError(
                f"{self.folder} has no complete checkpoint",
                "the run ended before its first save",
                f"start it again: {command_line('train', '--config', config)} --name NEW",
            )
        return newest

    @property
    def has_checkpoint(self) -> bool:
        """Is there anything to continue from?"""
        return self.start is not None or self._newest() is not None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def complete(self) -> list[Path]:
        """Complete checkpoints, by the number of updates done."""
        return complete_in(self.checkpoints)

    def _newest(self) -> Path | None:
        """What `latest` names; without it (a crash during the first save) any that is complete."""
        pointer = self.folder / LATEST
        name = ""
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if _STEP.fullmatch(name):
            for named in (self.checkpoints / name, self.checkpoints / f"{REPLACED}{name}"):
                if named.is_dir():
                    return named
        return next(reversed(self.complete()), None)

    def point_at(self, name: str) -> None:
        """Make the checkpoint of that name the newest, so that a crash finds the old or the new."""
        write_whole(self.folder / LATEST, f"{name}\n".encode())

    def record(self, event: Event) -> None:
        """Append an event to its file, flushed line by line.

        OSError: the disk; then nothing of the line is in the file.
        """
        path = self.folder / (METRICS if isinstance(event, Metric) else EVENTS)
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            line = memoryview((json.dumps(to_record(event)) + "\n").encode())
            try:
                while line:  # a disk that is nearly full takes a part
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(before)
                raise

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl; a line cut by a crash is left out."""
        return _complete_lines(self.folder / METRICS)

    def events(self) -> list[dict[str, Any]]:
        """Every complete line of events.jsonl."""
        return _complete_lines(self.folder / EVENTS)

    def forget_after(self, updates: int) -> None:
        """Drop metrics of updates that the checkpoint with `updates` done does not know, and what
        a crash left of a last line."""
        known = [line for line in self.metrics() if line["update"] < updates]
        for name, lines in ((METRICS, known), (EVENTS, _complete_lines(self.folder / EVENTS))):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_whole(self.folder / name, text.encode())


def require_new(config: Config) -> None:
    """ConfigError where `Run.create` would find its folder taken, before anything costs time."""
    if config.run.name and os.path.lexists(folder := Path(config.run.out) / config.run.name):
        raise _taken(folder)


def _taken(folder: Path) -> ConfigError:
    return ConfigError(
        f"the run folder {folder} exists",
        "a new run never writes into an old one",
        f"`{command_line('resume', folder)}` continues it; --name or --out chooses another",
    )


def complete_in(checkpoints: Path) -> list[Path]:
    """The folders step-NUMBER that are complete, by the number of updates done."""
    named = [path for path in checkpoints.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=update_of)


def update_of(checkpoint: Path) -> int:
    """The number of updates done of a checkpoint, by its name; -1 for another name."""
    found = _STEP.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file up to a line that a crash cut."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _free_name(config: Config) -> str:
    """The first of "llama-60m-galore-1", -2, ... that is not taken."""
    model = Path(config.model) if isinstance(config.model, str) else Path("model")
    model = model.resolve().parent if model.name == "config.json" else model
    stem = f"{model.name}-{config.optimizer.method}"
    number = 1
    while (Path(config.run.out) / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def _self_contained(config: Config, name: str) -> Config:
    """The configuration without a preset's name or a path that depends on where one stands."""
    data = config.data
    absolute = {
        key: os.path.abspath(value)
        for key, value in (("source", data.source), ("tokenizer", data.tokenizer))
        if value not in RESERVED and Path(value).exists()  # a folder `sample` is not meant by it
    }
    return config.model_copy(
        update={
            "model": resolve_model(config.model, Path.cwd()),
            "data": data.model_copy(update=absolute),
            "recipe": None,  # every setting of it is written down
            "run": config.run.model_copy(
                update={"name": name, "recipe": config.recipe or config.run.recipe}
            ),
        }
    )


def decides_bits(device: str) -> dict[str, str]:
    """What the last bits of an update depend on, beside the settings; device: "cpu" or "cuda"."""
    import torch

    from lowmem.kernels import dispatch

    found = {"torch": str(torch.__version__), "kernels": dispatch.choice()}
    if device == "cuda":
        return found | {"CUDA": str(torch.version.cuda), "card": torch.cuda.get_device_name()}
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return found | {"processor": processor, "threads": str(torch.get_num_threads())}


def environment() -> dict[str, Any]:
    """Versions and devices, for reading a run later."""
    import torch

    found: dict[str, Any] = {
        "lowmem": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "command": sys.argv[1:],
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
