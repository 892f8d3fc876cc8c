"""Save and restore a run, exactly: complete or absent, by name, without pickle.

checkpoints/step-001000/
    model/              a Hugging Face folder: weights, config.json, tokenizer, lowmem.json
    optimizer/          state.safetensors, key "<parameter>/<state key>"
    state.json          counters of the states, update, tokens, hash of the next batch
    manifest.json       every other file with size and sha256

There is no generator to save: all randomness is a function of (seed, name, counter).
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem import __version__
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError, ConfigError, DataError, short
from lowmem.model.huggingface import load_weights, save_folder
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.tensorfile import read_tensors, sha256_of, write_tensors
from lowmem.train.run import Run

SCHEMA_VERSION = 1
MANIFEST, STATE, STATES = "manifest.json", "state.json", Path("optimizer", "state.safetensors")
NEEDED = ("model/config.json", "model/model.safetensors", STATES.as_posix(), STATE)
ABOUT = "lowmem.json"  # what a model folder says of its training; transformers ignores it


@dataclass(frozen=True)
class Position:
    """Where a run stands: updates done and target tokens seen."""

    update: int = 0
    tokens: int = 0


def save(
    run: Run, model: Llama, optimizer: Optimizer, batches: Batches, corpus: Corpus, at: Position
) -> Path:
    """Write the checkpoint of `at` and make it the newest; older ones beyond `keep` go.

    Written under a temporary name, synced, renamed: what has its final name is complete.
    """
    final = run.folder / "checkpoints" / f"step-{at.update:06d}"
    work = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(work, ignore_errors=True)
    save_folder(model, work / "model", corpus.tokenizer())
    _write_json(work / "model" / ABOUT, _about(run, at))
    (work / STATES).parent.mkdir()
    write_tensors(work / STATES, list(optimizer.state_tensors()))
    state = {
        "schema_version": SCHEMA_VERSION,
        "lowmem": __version__,
        "update": at.update,
        "tokens": at.tokens,
        "optimizer_updates": optimizer.updates,
        "numbers": optimizer.state_numbers(),
        "corpus": corpus.fingerprint,
        "next_batch": batches.of(at.update).digest(),
    }
    _write_json(work / STATE, state)
    _write_manifest(work)
    _publish(work, final, run)
    _prune(run, final)
    return final


def _about(run: Run, at: Position) -> dict[str, Any]:
    data = run.config.data.model_dump(include={"source", "seq_len", "text_key", "skip_bad"})
    return {"lowmem": __version__, "update": at.update, "data": data}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    _write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, "files": files})


def _publish(work: Path, final: Path, run: Run) -> None:
    """Sync everything, give it its name, then point `latest` at it."""
    for path in [*work.rglob("*"), work]:
        _sync(path)
    if final.exists():  # a run that was continued from an earlier checkpoint comes by again
        old = final.with_name(f".tmp-old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    work.rename(final)
    _sync(final.parent)
    run.point_at(final.name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(run: Run, newest: Path) -> None:
    """Remove what is older than the newest `keep`; later ones belong to an abandoned future."""
    older = [path for path in _in_order(newest.parent) if _number(path) < _number(newest)]
    for path in older[: max(0, len(older) - run.config.checkpoint.keep + 1)]:
        path.rename(path.with_name(f".tmp-{path.name}"))  # what has its final name is complete
    for path in newest.parent.glob(".tmp-*"):
        shutil.rmtree(path)


def _in_order(checkpoints: Path) -> list[Path]:
    """Checkpoints by the number of updates done."""
    return sorted(checkpoints.glob("step-*"), key=_number)


def _number(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest; CheckpointError names the first."""
    files = _read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not set(NEEDED) <= set(files):
        raise _damaged(folder, f"{folder / MANIFEST} does not list {', '.join(NEEDED)}")
    for name, expected in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise _damaged(folder, f"{folder / MANIFEST} names {short(name)}, outside of it")
        if not isinstance(expected, dict) or not {"size", "sha256"} <= set(expected):
            raise _damaged(folder, f"{folder / MANIFEST} does not say size and sha256 of {name}")
        if not path.is_file():
            raise _damaged(folder, f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            size = path.stat().st_size
            raise _damaged(folder, f"{path} has {size} bytes instead of {expected['size']}")
        if sha256_of(path) != expected["sha256"]:
            raise _damaged(folder, f"{path} is damaged: its sha256 is not that of the manifest")


def restore(
    folder: Path, model: Llama, optimizer: Optimizer, batches: Batches, corpus: Corpus
) -> Position:
    """Put a checkpoint back into a model and an optimizer of the same shape.

    CheckpointError: damaged, incomplete, or of another model or method. DataError: the tokens that
    come next are not those of the run.
    """
    verify(folder)
    state = _read_json(folder / STATE)
    if state.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has schema version {state.get('schema_version')}",
            f"this lowmem {__version__} reads version {SCHEMA_VERSION}",
            f"use lowmem {state.get('lowmem')}",
        )
    _check_state(folder, state)
    load_weights(model, folder / "model")
    optimizer.restore(read_tensors(folder / STATES), state["numbers"], state["optimizer_updates"])
    at = Position(state["update"], state["tokens"])
    if batches.of(at.update).digest() != state["next_batch"]:
        raise DataError(
            f"the batch of update {at.update} is not the one that {folder} expects",
            f"the corpus is {corpus.fingerprint[:12]}, the run began with {state['corpus'][:12]}",
            "restore the text and the tokenizer the run began with",
        )
    return at


_STATE_TYPES = {
    "update": int,
    "tokens": int,
    "optimizer_updates": int,
    "numbers": dict,
    "corpus": str,
    "next_batch": str,
}


def _check_state(folder: Path, state: dict[str, Any]) -> None:
    """CheckpointError for a state.json that the manifest vouches for and that makes no sense."""
    for key, kind in _STATE_TYPES.items():
        value = state.get(key)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**62):
            shown = short(repr(value))
            raise _damaged(folder, f"{folder / STATE} has {key} = {shown}, which it never writes")
    for name, numbers in state["numbers"].items():
        if not isinstance(numbers, dict) or not all(
            type(n) in (int, float) for n in numbers.values()
        ):
            raise _damaged(folder, f"{folder / STATE} has no counters for {short(name)}")


def model_folder(path: Path) -> Path:
    """The Hugging Face folder that a path to weights means, verified where it has a manifest.

    path: a run (its newest checkpoint), a checkpoint, or such a folder. CheckpointError: none.
    """
    if os.path.isfile(path / "config.json"):  # pathlib raises where a name is too long
        return path
    checkpoint = path if os.path.isfile(path / MANIFEST) else Run.open(path).latest()
    verify(checkpoint)
    return checkpoint / "model"


def export(path: Path, out: Path) -> None:
    """Copy the Hugging Face folder of a run or checkpoint to `out`, verified.

    ConfigError: `out` cannot be written.
    """
    folder = model_folder(path)
    try:
        shutil.copytree(folder, out, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise ConfigError(
            f"{short(str(out))} cannot be written",
            short(str(error), 300),
            "give a new folder in a place you may write to, with room for the weights",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path.parent, f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise _damaged(path.parent, f"{path} is no JSON object")
    return content


def _damaged(folder: Path, what: str) -> CheckpointError:
    older = [p for p in _in_order(folder.parent) if _number(p) < _number(folder)]
    fix = "restore the file from a copy"
    if older:
        fix = f"continue from an older one: lowmem resume {older[-1]}"
    return CheckpointError(what, "a checkpoint is used whole or not at all", fix)
