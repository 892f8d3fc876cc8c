"""How an update may be made: its mode, the format of its sums, and what of it lives in host memory.

What else was asked may leave no way: each `check_` says so.
"""

from dataclasses import dataclass
from typing import TypeVar

from lowmem.config.schema import (
    MOVE_EARLY,
    Auto,
    BoundaryPlace,
    Config,
    OptimizerConfig,
    StatePlace,
    SumFormat,
    UpdateMode,
    settled,
)
from lowmem.errors import ConfigError
from lowmem.optim.methods import build_method
from lowmem.planner.candidates import Kind

T = TypeVar("T")
BOUNDARIES: tuple[BoundaryPlace, ...] = ("keep", "host")  # on the device first
PLACES: tuple[StatePlace, ...] = ("device", "host")
_UNCLIPPED = (
    "--clip off (the norm is in the log, known after the update), --update unfused, or "
    "--update fused+subspace"
)
CLIP = 1.0  # where nobody says otherwise and the norm is known before weights move


@dataclass(frozen=True)
class Way:
    """How an update is made, and what of it lives in host memory."""

    update: UpdateMode
    boundaries: BoundaryPlace = "keep"
    place: StatePlace = "device"
    blocks: StatePlace = "device"


def ways(config: Config, kind: Kind, rows: int) -> list[Way]:
    """Update modes with every place that states and block inputs may have, best modes first.

    ConfigError for contradictions. Host memory is taken in layer-major order, where the user has
    chosen that and left the place open, and where it was asked for; `forms.py` asks for it where
    nothing else fits.
    """
    found: list[Way] = []
    for mode in modes(config, kind, rows):
        if mode == "layer-major":
            found += [
                Way(mode, boundaries, place, blocks)
                for boundaries in _open(config, config.train.boundaries, BOUNDARIES)
                for place in _open(config, config.optimizer.place, PLACES)
                for blocks in _open(config, config.train.blocks, PLACES)
                if blocks == "device" or place == "host"
            ]
        else:
            boundaries = _settled(config.train.boundaries, BOUNDARIES[0])
            found.append(Way(mode, boundaries, _settled(config.optimizer.place, PLACES[0])))
    return found


def _open(config: Config, given: T | Auto, both: tuple[T, ...]) -> tuple[T, ...]:
    """What was given, or both where that is open; a CPU has no other memory than the host's."""
    if given != "auto":
        return (settled(given),)
    return both if config.train.device == "cuda" else both[:1]


def _settled(given: T | Auto, otherwise: T) -> T:
    return otherwise if given == "auto" else settled(given)


def modes(config: Config, kind: Kind, rows: int) -> list[UpdateMode]:
    """Update modes that do what was asked, best first. ConfigError for contradictions."""
    wanted, clip = config.train.update, config.train.clip
    check_places(config)
    asked = curvatures(kind, config.optimizer)
    if asked:
        check_curvature(config, asked)
        return ["unfused"]
    if wanted == "fused":
        check_fused(config, rows)
    if wanted == "layer-major":
        check_layer_major(config)
    if wanted != "auto":
        return [settled(wanted)]
    if config.train.blocks == "host":
        check_layer_major(config)
        return ["layer-major"]
    found: list[UpdateMode] = ["unfused"]
    if config.optimizer.place == "host":
        return found
    if sums_projected(kind, config.optimizer):
        found.append("fused+subspace")
    keeps_none = not isinstance(clip, float) and config.train.sums in ("auto", "fp32")
    if keeps_none and config.train.micro_batch in ("auto", rows):
        found.append("fused")
    return found


def sum_formats(config: Config, kind: Kind) -> tuple[SumFormat, ...]:
    """Formats of the sums of gradients to try, exact ones first; the next only where one does not
    fit. Those in host memory are not among them: `forms.py` has them last of all.

    bf16 costs no quality: the published runs sum so, and round to nearest.
    """
    if config.train.sums != "auto":
        return (settled(config.train.sums),)
    coarser = config.train.device == "cuda" and not curvatures(kind, config.optimizer)
    return ("fp32", "bf16", "int8") if coarser else ("fp32",)


def clip_of(config: Config, mode: UpdateMode) -> float | None:
    """The gradient norm limit of that mode; None is off."""
    clip = config.train.clip
    if clip == "auto":
        return None if mode in MOVE_EARLY else CLIP
    return clip if isinstance(clip, float) else None


def sums_projected(kind: Kind, optimizer: OptimizerConfig) -> bool:
    """Can the gradients of its matrices be summed as projections?"""
    any_size = 1  # the form of a method is the same for all
    return not kind.built(optimizer, any_size).matrix.needs.full_gradient


def curvatures(kind: Kind, optimizer: OptimizerConfig) -> dict[str, str]:
    """Estimates of the curvature that are asked for, with the method that asks."""
    built = {kind.method: kind.built(optimizer, 1)}
    rest = optimizer.rest
    if rest.method != "auto":
        built[rest.method] = build_method(rest.method, dict(rest.options), "optimizer.rest")
    return {
        part.needs.curvature: name
        for name, roles in built.items()
        for part in (roles.matrix, roles.other, roles.embedding, roles.head)
        if part is not None and part.needs.curvature != "none"
    }


def check_places(config: Config) -> None:
    """ConfigError where something is to live in host memory that the update mode needs always."""
    update = config.train.update
    if config.train.blocks == "host" and update not in ("auto", "layer-major"):
        raise ConfigError(
            f'train.blocks = "host" with train.update = "{update}"',
            "in other orders every micro-batch would fetch the weights of all blocks",
            "--update layer-major, or --blocks device",
        )
    if config.train.blocks == "host" and config.optimizer.place == "device":
        raise ConfigError(
            'train.blocks = "host" with optimizer.place = "device"',
            "the states of a weight are larger than the weight, and needed less often",
            "--place host, or --blocks device",
        )
    if config.optimizer.place == "host" and update in ("fused", "fused+subspace"):
        raise ConfigError(
            f'optimizer.place = "host" with train.update = "{update}"',
            "subspaces are needed for the gradient of every micro-batch, in the middle of backward",
            "--update layer-major or unfused, or --place device",
        )


def check_fused(config: Config, rows: int) -> None:
    """ConfigError where `fused` cannot do what else was asked."""
    if isinstance(config.train.clip, float):
        raise ConfigError(
            f'train.clip = {config.train.clip} with train.update = "fused"',
            "the gradient is never in memory as a whole, and its norm is known only after the "
            "last weights have changed",
            _UNCLIPPED,
        )
    if config.train.sums not in ("auto", "fp32"):
        raise ConfigError(
            f'train.sums = "{config.train.sums}" with train.update = "fused"',
            "every gradient is used as soon as it is there: no sums are kept",
            "leave out --sums, or --update unfused",
        )
    micro = config.train.micro_batch
    if micro != "auto" and settled(micro) < rows:
        raise ConfigError(
            f'train.update = "fused" cannot accumulate {rows} sequences, {micro} at a time',
            "every weight changes as soon as its gradient is there: one micro-batch per update",
            f"--batch {micro}seq, or --update fused+subspace",
        )


def check_layer_major(config: Config) -> None:
    """ConfigError where layer-major order cannot do what else was asked."""
    if isinstance(config.train.clip, float):
        raise ConfigError(
            f"train.clip = {config.train.clip} with layer-major order",
            "the last block has been updated before the gradient of the first is known, and with "
            "it the norm",
            _UNCLIPPED,
        )
    if config.train.sums not in ("auto", "fp32"):
        raise ConfigError(
            f'train.sums = "{config.train.sums}" with layer-major order',
            "the sums of one block are in memory at a time, so they are exact",
            "--sums fp32, or another --update",
        )
    if config.train.recompute not in ("auto", "full"):
        raise ConfigError(
            f'train.recompute = "{config.train.recompute}" with layer-major order',
            "a block has seen all micro-batches before its backward begins, so it keeps nothing "
            "but its inputs",
            "--recompute full, or another --update",
        )


def check_curvature(config: Config, asked: dict[str, str]) -> None:
    """ConfigError where what else was asked leaves no way to estimate the curvature."""
    if config.train.update not in ("auto", "unfused"):
        raise ConfigError(
            f'train.update = "{config.train.update}" with method {next(iter(asked.values()))!r}',
            "it estimates the curvature from whole gradients of a pass of its own, which must be "
            "held until the last micro-batch",
            "--update unfused",
        )
    if config.train.sums not in ("auto", "fp32"):
        raise ConfigError(
            f'train.sums = "{config.train.sums}" with method {next(iter(asked.values()))!r}',
            "it estimates the curvature from sums of gradients, and their rounding would be in it",
            "--sums fp32",
        )
    weights = config.train.weights
    if "hutchinson" in asked and weights not in ("auto", "fp32"):
        raise ConfigError(
            f'train.weights = "{weights}" with method {asked["hutchinson"]!r}',
            f"it measures the Hessian by moving every weight by a thousandth, and {weights} rounds "
            "most of that away",
            "--weights fp32, or method sophia, which moves nothing",
        )
