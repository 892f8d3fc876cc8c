"""Go on with other settings than a checkpoint was written with, and say what of it is exact.

`settings_of` stands in every checkpoint, so that its states can be read whatever the run has become
since: after a rollback, a crash before the first save, or from any older checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowmem.config.schema import Config, OptimizerConfig
from lowmem.errors import CheckpointError, LowMemError, short
from lowmem.model.huggingface import load_any_weights, load_weights
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.convert import Change, How, convert
from lowmem.optim.optimizer import Optimizer
from lowmem.tensorfile import read_tensors
from lowmem.train.events import Converted, ConvertedPart

_TRAIN = ("weights", "device", "update", "sums", "micro_batch", "recompute", "logits", "clip")

_BECOMES: dict[How, str] = {
    "kept": "the same values",
    "rounded": "rounded once to the new format",
    "cut": "smaller rank: the directions with the most gradient stay",
    "extended": "larger rank: new directions, whose first moment is zero",
    "anew": "begin anew, with their bias correction: they mean nothing to the new method",
}
_FROM_NOW_ON = {
    "update": "subspaces may be chosen from another gradient",
    "sums": "gradients are summed so from the next update on",
    "micro_batch": "the same batches; sums are made in another order",
    "recompute": "the same numbers, made twice or kept",
    "logits": "the same numbers, made twice or kept",
    "clip": "from the next update on",
    "device": "sums are made in another order",
}
_EXACT = ("recompute", "logits", "clip")


def settings_of(config: Config) -> dict[str, Any]:
    """What the states of a run depend on, and how its updates are computed; plain JSON."""
    train = config.train.model_dump(mode="json", include=set(_TRAIN))
    return {"optimizer": config.optimizer.model_dump(mode="json"), **train}


def take_over(
    folder: Path,
    states: Path,
    state: dict[str, Any],
    model: Llama,
    optimizer: Optimizer,
    config: Config,
) -> Converted:
    """Load a checkpoint into a model and an optimizer of other settings.

    states: the file of the optimizer's states. state: the content of state.json. CheckpointError:
    the checkpoint is not what its own settings say, or cannot be converted.
    """
    before, after = state["settings"], settings_of(config)
    written = written_optimizer(folder, before, model, optimizer)
    error = None
    if before["weights"] == after["weights"] and before["device"] == after["device"]:
        load_weights(model, folder / "model")
    else:
        error = load_any_weights(model, folder / "model")
    counts = state["numbers"], state["optimizer_updates"]
    changes = convert(optimizer, written, read_tensors(states), *counts)
    return Converted(state["update"], list(_parts(before, after, error, changes)))


def written_optimizer(
    folder: Path, settings: dict[str, Any], model: Llama, optimizer: Optimizer
) -> Optimizer:
    """The optimizer that has written a checkpoint, on meta. CheckpointError: it cannot be made."""
    try:
        dtype = compute_dtype(settings["weights"], settings["device"])
        shapes = {
            name: torch.empty(weight.shape, dtype=dtype, device="meta")
            for name, weight in model.weights().items()
        }
        config = OptimizerConfig.model_validate(settings["optimizer"])
        return build_optimizer(
            config.model_copy(update={"place": "device"}),  # on meta it is nowhere
            shapes,
            model.roles(),
            mode=optimizer.mode,
            seed=optimizer.seed,
            head_dim=model.config.head_dim,
        )
    except (KeyError, TypeError, ValidationError, LowMemError) as error:
        raise CheckpointError(
            f"the settings that {folder} was written with cannot be used",
            short(str(error), 300),
            "install the package of its method, or resume from another checkpoint",
        ) from error


def _parts(
    before: dict[str, Any], after: dict[str, Any], error: float | None, changes: list[Change]
) -> Iterator[ConvertedPart]:
    yield ConvertedPart("data order, schedule, update", True, 0.0, "go on where they were")
    old, new = before["weights"], after["weights"]
    if error is None:
        yield ConvertedPart("weights", True, 0.0, f"{new}, the same values")
    else:
        how = f"{old} -> {new}, rounded to the nearest" if error else f"{old} -> {new}, same values"
        yield ConvertedPart("weights", error == 0.0, error, how)
    for change in changes:
        count = f"states of {change.weights} weights"
        wrong = 1.0 if change.how == "anew" else change.error
        exact = change.how == "kept"
        yield ConvertedPart(count, exact, wrong, _BECOMES[change.how])
    for key, what in _FROM_NOW_ON.items():
        if before.get(key) != after.get(key):
            said = f"{before.get(key)} -> {after.get(key)}, {what}"
            yield ConvertedPart(key.replace("_", "-"), key in _EXACT, 0.0, said)
    for key in ("method", "lr", "weight_decay"):
        old, new = before["optimizer"].get(key), after["optimizer"].get(key)
        if old != new:
            yield ConvertedPart(
                key.replace("_", "-"), False, 0.0, f"{old} -> {new} from the next update on"
            )
