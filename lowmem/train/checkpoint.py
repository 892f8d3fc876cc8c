"""Save and restore a run, exactly: complete or absent, by name, without pickle.

checkpoints/step-001000/
    model/              a Hugging Face folder: weights, config.json, tokenizer, lowmem.json;
                        of weights in codes one that only lowmem reads, see model/huggingface.py
    optimizer/          state.safetensors, key "<parameter>/<state key>"
    state.json          counters of the states, update, tokens, hash of the next batch
    manifest.json       every other file with size and sha256, and its own sha256

Written under a temporary name, every file and folder synced, renamed, then named in `latest`: what
has its final name is complete. There is no generator to save: all randomness is a function of
(seed, name, counter). See docs/checkpoints.md.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lowmem import __version__
from lowmem.config.schema import Config
from lowmem.data.batches import TrainingOrder
from lowmem.data.cache import sync_folder
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError, ConfigError, DataError, command_line, short, short_path
from lowmem.model.huggingface import (
    CODES,
    WEIGHTS,
    folder_files,
    folder_weights,
    in_codes,
    load_weights,
    weights_file,
    write_floats,
)
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.restore import restore_states
from lowmem.tensorfile import read_tensors, sha256_of, stays_inside, write_tensors
from lowmem.train.convert import settings_of, take_over
from lowmem.train.divergence import Memory
from lowmem.train.events import Converted
from lowmem.train.retention import superseded
from lowmem.train.run import MANIFEST, REPLACED, Run, complete_in, decides_bits, update_of
from lowmem.train.rungs import Rungs
from lowmem.train.snapshot import Position, Snapshot, TensorFile

SCHEMA_VERSION = 1
STATE, STATES = "state.json", "optimizer/state.safetensors"
NEEDED = ("model/config.json", STATES, STATE)  # and the weights, as floats or codes
ABOUT = "lowmem.json"  # what a model folder says of its training; transformers ignores it


def capture(
    run: Run,
    model: Llama,
    optimizer: Optimizer,
    batches: TrainingOrder,
    corpus: Corpus,
    at: Position,
) -> Snapshot:
    """The content of the checkpoint of `at`; its tensors are the live ones, not copies."""
    files = folder_files(model, corpus.tokenizer())
    files[ABOUT] = _json(_about(run, at))
    state = {
        "schema_version": SCHEMA_VERSION,
        "lowmem": __version__,
        "update": at.update,
        "tokens": at.tokens,
        "carried": at.carried,
        "optimizer_updates": optimizer.updates,
        "numbers": optimizer.state_numbers(),
        "settings": settings_of(run.config),
        "decides_bits": decides_bits(model.head_weight.device.type),
        "corpus": corpus.fingerprint,
        "next_batch": batches.of(at.update).digest(),
    }
    weights, metadata = weights_file(model)
    return Snapshot(
        at,
        {f"model/{name}": content for name, content in files.items()} | {STATE: _json(state)},
        {
            f"model/{weights}": TensorFile(folder_weights(model), metadata),
            STATES: TensorFile(list(optimizer.state_tensors())),
        },
    )


def save(
    run: Run,
    model: Llama,
    optimizer: Optimizer,
    batches: TrainingOrder,
    corpus: Corpus,
    at: Position,
) -> Path:
    """Write the checkpoint of `at` at once; see `write`."""
    return write(run, capture(run, model, optimizer, batches, corpus, at))


def write(run: Run, snapshot: Snapshot) -> Path:
    """Write a checkpoint and make it the newest; those that nobody needs any more go.

    OSError: the disk. Then nothing is left of it, and what was there before still is.
    """
    final = run.checkpoints / f"step-{snapshot.at.update:06d}"
    work = final.with_name(f".tmp-{final.name}")
    tidy(run)
    try:
        _write_files(work, snapshot)
        _publish(work, final)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)  # a full disk needs the room
        raise
    run.point_at(final.name)
    _prune(run, snapshot.at)
    return final


def tidy(run: Run) -> None:
    """Remove what a crash left half written; give a replaced checkpoint its name back."""
    for left in run.checkpoints.glob(".tmp-*"):
        final = left.with_name(left.name.removeprefix(REPLACED))
        if left.name.startswith(REPLACED) and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left)


def _about(run: Run, at: Position) -> dict[str, Any]:
    told = {"protocol", "source", "seq_len", "text_key", "skip_bad"}
    data = run.config.data.model_dump(include=told)
    batches = run.config.evaluate.model_dump(include={"batch", "gpus"})
    return {"lowmem": __version__, "update": at.update, "data": data, "evaluate": batches}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    """Every file, synced, its sha256 taken from what is written; the manifest is the last."""
    sums = {}
    for name in [*snapshot.files, *snapshot.tensors]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in snapshot.files.items():
        sums[name] = _write_bytes(folder / name, content)
    for name, file in snapshot.tensors.items():
        sums[name] = write_tensors(folder / name, file.tensors, file.metadata)
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sums[name]}
        for name in sorted(sums)
    }
    _write_bytes(
        folder / MANIFEST, _json(signed({"schema_version": SCHEMA_VERSION, "files": files}))
    )
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)


def _write_bytes(path: Path, content: bytes) -> str:
    """Write and sync a small file; its sha256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of its own content, so that its bits are guarded too."""
    content = json.dumps(manifest, sort_keys=True).encode()
    return manifest | {"sha256": hashlib.sha256(content).hexdigest()}


def _publish(work: Path, final: Path) -> None:
    """Give a complete checkpoint its name, in the place of an older one if need be."""
    old = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # a run that was continued from an earlier checkpoint comes by again
        final.rename(old)
    try:
        work.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _prune(run: Run, at: Position) -> None:
    """Remove what is older than `at` and superseded; later ones belong to an abandoned future."""
    config = run.config.checkpoint
    by_update = {update_of(path): path for path in run.complete()}
    best = at.carried.get("best", {}).get("update") if config.keep_best else None
    older = [update for update in by_update if update < at.update]
    reach = run.config.guard.reach
    for update in superseded(older, at.update, config, best=best, reach=reach):
        path = by_update[update]
        gone = path.with_name(f".tmp-{path.name}")  # what has its final name is complete
        path.rename(gone)
        shutil.rmtree(gone)


def newest_until(run: Run, update: int) -> Path | None:
    """The newest checkpoint of at most so many updates; None: there is none."""
    return next((path for path in reversed(run.complete()) if update_of(path) <= update), None)


def newest_intact(run: Run, before: Path) -> Path:
    """The newest checkpoint older than `before` that is intact. CheckpointError: none is."""
    older = [path for path in run.complete() if update_of(path) < update_of(before)]
    for path in reversed(older):
        try:
            verify(path)
        except CheckpointError:
            continue
        return path
    raise CheckpointError(
        f"no intact checkpoint is older than {before}",
        f"{len(older)} older ones were looked at",
        "restore the damaged file from a copy, or begin a new run",
    )


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest; CheckpointError names the first."""
    manifest = _read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not set(NEEDED) <= set(files):
        raise _damaged(folder, f"{folder / MANIFEST} does not list {', '.join(NEEDED)}")
    if not {f"model/{WEIGHTS}", f"model/{CODES}"} & set(files):
        raise _damaged(folder, f"{folder / MANIFEST} lists neither {WEIGHTS} nor {CODES}")
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest != signed(content):
        raise _damaged(folder, f"{folder / MANIFEST} is damaged: its sha256 is not its own")
    for name, expected in files.items():
        path = folder / name
        if not stays_inside(name):
            raise _damaged(
                folder, f"{folder / MANIFEST} names {short(name)}, outside of its folder"
            )
        if not isinstance(expected, dict) or not {"size", "sha256"} <= set(expected):
            raise _damaged(folder, f"{folder / MANIFEST} does not say size and sha256 of {name}")
        if not path.is_file():
            raise _damaged(folder, f"{path} is missing")
        if path.stat().st_size != expected["size"]:
            size = path.stat().st_size
            raise _damaged(folder, f"{path} has {size} bytes instead of {expected['size']}")
        if sha256_of(path) != expected["sha256"]:
            raise _damaged(folder, f"{path} is damaged: its sha256 is not that of the manifest")


def bits_differ_by(folder: Path, device: str) -> list[str]:
    """What is not as it was when the checkpoint was written, e.g. "threads 1, now 2"."""
    before, now = read_state(folder).get("decides_bits", {}), decides_bits(device)
    other = [key for key in now if before.get(key, now[key]) != now[key]]
    return [f"{key} {before[key]}, now {now[key]}" for key in other]


def restore(
    folder: Path,
    model: Llama,
    optimizer: Optimizer,
    batches: TrainingOrder,
    corpus: Corpus,
    config: Config | None = None,
) -> tuple[Position, Converted | None]:
    """Put a checkpoint back into a model and an optimizer of the same model.

    config: with the settings of both; a checkpoint of other ones is converted, and the second
    result says how. Without it, that is an error. CheckpointError: damaged, incomplete, or of
    another model or method. DataError: the tokens that come next are not those of the run.
    """
    verify(folder)
    state = read_state(folder)
    at = Position(state["update"], state["tokens"], state["carried"])
    if batches.of(at.update).digest() != state["next_batch"]:
        raise DataError(
            f"the batch of update {at.update} is not the one that {folder} expects",
            f"the corpus is {corpus.fingerprint[:12]}, the run began with {state['corpus'][:12]}",
            "restore the text and the tokenizer the run began with",
        )
    settings = state.get("settings")
    if config is not None and settings is not None and settings != settings_of(config):
        return at, take_over(folder, folder / STATES, state, model, optimizer, config)
    load_weights(model, folder / "model")
    tensors, updates = read_tensors(folder / STATES), state["optimizer_updates"]
    restore_states(optimizer, tensors, state["numbers"], updates)
    return at, None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. CheckpointError: of another version, or nonsense."""
    state = _read_json(folder / STATE)
    if state.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has schema version {state.get('schema_version')}",
            f"this lowmem {__version__} reads version {SCHEMA_VERSION}",
            f"use lowmem {state.get('lowmem')}",
        )
    _check_state(folder, state)
    return state


_STATE_TYPES = {
    "update": int,
    "tokens": int,
    "optimizer_updates": int,
    "numbers": dict,
    "carried": dict,
    "corpus": str,
    "next_batch": str,
}


class _Best(TypedDict):
    update: int
    loss: float


class _Carried(TypedDict, total=False):
    guard: Memory
    best: _Best | None
    ladder: Rungs


_CARRIED = TypeAdapter(_Carried)


def _check_state(folder: Path, state: dict[str, Any]) -> None:
    """CheckpointError for a state.json that the manifest vouches for and that makes no sense."""
    for key, kind in _STATE_TYPES.items():
        value = state.get(key)
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**62):
            shown = short(repr(value))
            raise _damaged(folder, f"{folder / STATE} has {key} = {shown}, which it never writes")
    for key in ("settings", "decides_bits"):
        if not isinstance(state.get(key, {}), dict):
            raise _damaged(folder, f"{folder / STATE} has {key} that are no table")
    for name, numbers in state["numbers"].items():
        if not isinstance(numbers, dict) or not all(
            type(n) in (int, float) for n in numbers.values()
        ):
            raise _damaged(folder, f"{folder / STATE} has no counters for {short(name)}")
    try:
        _CARRIED.validate_json(json.dumps(state["carried"]), strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise _damaged(folder, f"{folder / STATE} carries something odd: {short(where)}") from None


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
    """Copy the Hugging Face folder of a run or checkpoint to `out`, verified; codes as floats.

    ConfigError: `out` cannot be written.
    """
    folder = model_folder(path)
    try:
        shutil.copytree(folder, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CODES))
        if in_codes(folder):
            write_floats(folder, out)
    except (OSError, shutil.Error) as error:
        raise ConfigError(
            f"{short_path(out)} cannot be written",
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
    fix = "restore the file from a copy"
    older = [path for path in complete_in(folder.parent) if update_of(path) < update_of(folder)]
    if older:
        run = folder.parent.parent
        fix = (
            f"continue from an older one: {command_line('resume', older[-1])}\n"
            "or from the newest of them that is intact: "
            f"{command_line('resume', run, '--from', 'previous')}"
        )
    return CheckpointError(what, "a checkpoint is used whole or not at all", fix)
