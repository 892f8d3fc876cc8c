"""A configuration with what the planner chose written down, and the notes that say why."""

from collections.abc import Mapping
from typing import Any

from lowmem.config.schema import Config, ModelConfig
from lowmem.optim.assign import learning_rate, weight_decay
from lowmem.optim.methods import METHODS, method_spec
from lowmem.optim.methods.third_party import package_of, refused
from lowmem.planner.candidates import sheet_settings
from lowmem.planner.job import kind_of
from lowmem.planner.plan import INSTEAD, Choice


def filled_in(config: Config, choice: Choice, model: ModelConfig) -> Config:
    """The configuration with everything that the planner chose written down."""
    kind = kind_of(choice)
    optimizer = kind.optimizer(config.optimizer, model.parameters)
    optimizer = optimizer.model_copy(
        update={
            "lr": learning_rate(optimizer, model.parameters),
            "weight_decay": weight_decay(optimizer, model.parameters),
            "place": choice.place,
        }
    )
    layer_major = choice.update == "layer-major"
    train = config.train.model_copy(
        update={
            "micro_batch": choice.micro_batch,
            "update": choice.update,
            "recompute": choice.recompute,
            "logits": choice.logits,
            "clip": "off" if choice.clip is None else choice.clip,
            "weights": choice.weights,
            "ends": choice.ends,
            "sums": choice.sums,
            "boundaries": choice.boundaries,
            **({"blocks": choice.blocks} if layer_major else {}),
        }
    )
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def notes_of(config: Config, filled: Config, model: ModelConfig) -> list[str]:
    """What nobody gave and memory does not decide: rate, clipping, the method's own arguments."""
    method = filled.optimizer.method
    spec = method_spec(method)
    size = spec.recipe_size(model.parameters)
    recipe = f"the sheet of {method} ({'for all sizes' if size == 'any' else f'{size} recipe'})"
    said = [
        f"method {method}: lowmem's own; the one of {package_of(entry)} is refused"
        for entry in refused(METHODS)
        if entry.name == method in METHODS
    ]
    if config.train.compile:
        said.append("compile: planned as if it were off, which takes as much or more")
    if config.optimizer.lr == "auto":
        said.append(f"lr {filled.optimizer.lr:g}: from {recipe}, {spec.source}")
    if config.optimizer.weight_decay == "auto" and filled.optimizer.weight_decay:
        said.append(f"weight-decay {filled.optimizer.weight_decay:g}: from {recipe}")
    if config.train.clip == "auto":
        early = f"{filled.train.update} updates cannot be clipped"
        why = early if filled.train.clip == "off" else "the usual limit"
        said.append(f"clip {filled.train.clip}: {why}")
    sheet = sheet_settings(method, model.parameters, config.optimizer.options)
    own = {k: v for k, v in spec.arguments.items() if v is not None}
    rest = {k: v for k, v in own.items() if k not in ("rank", "states", *filled.optimizer.options)}
    said += [f"{_words(sheet)}: from {recipe}"] if sheet else []
    return [*said, *([f"{_words(rest)}: defaults of {method}"] if rest else [])]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def about_sums(choice: Choice) -> list[str]:
    if choice.sums == "fp32":
        return []
    where = f"{choice.sums} sums of gradients"
    if choice.sums == "host":
        where = "sums of gradients in host memory"
    return [f"{where}{INSTEAD}fp32 ones on the card, which do not fit"]


def about_inputs(choice: Choice) -> list[str]:
    if choice.boundaries == "keep" or choice.update == "layer-major":
        return []
    return [f"block inputs in host memory{INSTEAD}on the card, where they do not fit"]
