"""What may be varied, best first, and what the user's own settings leave of it.

A family is a method with formats of moments and weights, and the ranks that it may have. Families
are ordered by the published evidence (`quality.py`) for their largest rank, which is what the
method's sheet says for a model of that size unless the user wants the largest that fits.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from lowmem.config.presets import read_preset
from lowmem.config.schema import (
    MOVE_EARLY,
    Auto,
    BoundaryPlace,
    Config,
    Ends,
    ModelConfig,
    OptimizerConfig,
    StatePlace,
    SumFormat,
    UpdateMode,
    WeightFormat,
    settled,
)
from lowmem.errors import ConfigError
from lowmem.optim.assign import method_options, takes_rank
from lowmem.optim.method import ByRole
from lowmem.optim.methods import METHODS, MethodSpec, build_method, method_spec
from lowmem.optim.methods.spec import SHEET_ONLY
from lowmem.planner.quality import Penalty, automatic, penalty

T = TypeVar("T")
BOUNDARIES: tuple[BoundaryPlace, ...] = ("keep", "host")  # on the device first
PLACES: tuple[StatePlace, ...] = ("device", "host")
LEAST_SHARE = 8  # of the sheet's rank, below which the planner does not go unasked
RANK_STEP = 8  # tensor cores want multiples of it; of small ranks every one is tried
_SMALLEST_RANK = 4  # unless the sheet says less
_SHARE = 4  # rank is a quarter of the hidden size where a sheet has one for no size
_ONE_SETTING = {"alpha", "scale"}  # APOLLO's scale is alpha squared; others have only one of them
OWN = "own"  # states of a method that leaves no choice
_UNCLIPPED = (
    "--clip off (the norm is in the log, known after the update), --update unfused, or "
    "--update fused+subspace"
)
CLIP = 1.0  # where nobody says otherwise and the norm is known before weights move


@dataclass(frozen=True)
class Kind:
    """What decides quality: method, rank, moments, weights, ends and sums of gradients."""

    method: str
    rank: Any
    states: str
    weights: WeightFormat = "bf16"
    ends: Ends = "exact"
    sums: SumFormat = "fp32"

    def optimizer(self, config: OptimizerConfig, parameters: int) -> OptimizerConfig:
        """`config` with this method, rank and format, and what its sheet says of other settings.

        parameters: of the model; the sheet's size nearest to it counts.
        """
        sheet = sheet_settings(self.method, parameters, config.options)
        return config.model_copy(
            update={
                "method": self.method,
                "rank": "auto" if self.rank is None else self.rank,
                "states": "auto" if self.states == OWN else self.states,
                "options": sheet | config.options,
            }
        )

    def built(self, config: OptimizerConfig, parameters: int) -> ByRole:
        """The method for `config`; of any rank, where that is a fraction."""
        options = method_options(self.optimizer(config, parameters))
        if isinstance(options.get("rank"), float):
            options["rank"] = 1
        return build_method(self.method, options)


@dataclass(frozen=True)
class Family:
    """Kinds that differ in their rank only; ranks: the least first, (None,) without any."""

    method: str
    states: str
    weights: WeightFormat
    ranks: tuple[Any, ...]
    ends: Ends = "exact"
    sums: SumFormat = "fp32"

    def kind(self, rank: Any) -> Kind:
        return Kind(self.method, rank, self.states, self.weights, self.ends, self.sums)

    @property
    def best(self) -> Kind:
        return self.kind(self.ranks[-1])

    @property
    def least(self) -> Kind:
        return self.kind(self.ranks[0])


def sheet_settings(method: str, parameters: int, given: Collection[str]) -> dict[str, Any]:
    """What the method's sheet says for a model of that size of arguments that are not `given`.

    Without lr and decay, which are no arguments, and rank and format: the planner's choice.
    """
    settled_otherwise = {*SHEET_ONLY, "rank", "states", *given}
    if not _ONE_SETTING.isdisjoint(given):
        settled_otherwise |= _ONE_SETTING
    found = method_spec(method).recipe(parameters).items()
    chosen = {k: v for k, v in found if k not in settled_otherwise}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}


def families(config: Config, model: ModelConfig) -> list[Family]:
    """Every family that the user's settings allow, best first. ConfigError: unsuitable settings.

    Equal in quality: in the order of METHODS, exact moments and weights first.
    """
    optimizer = config.optimizer
    names = [optimizer.method]
    if optimizer.method == "auto":
        names = _automatic(optimizer)
    found: list[Family] = []
    problem: ConfigError | None = None
    for name in names:
        for family in _families_of(name, config, model):
            try:  # a wrong option is told before anything is rehearsed
                family.best.built(optimizer, model.parameters)
                found.append(family)
            except ConfigError as error:  # it may suit another method
                problem = problem or error
    if problem is not None and (not found or optimizer.method != "auto"):
        raise problem
    return sorted(found, key=lambda family: quality(family.best, model).rung)


def _automatic(optimizer: OptimizerConfig) -> list[str]:
    """Methods with evidence that take the user's settings."""
    names = automatic(list(METHODS), ranked=optimizer.rank != "auto")
    able = [
        name for name in names if optimizer.options.keys() <= method_spec(name).arguments.keys()
    ]
    return able or names  # an option that none has is told later


def quality(kind: Kind, model: ModelConfig) -> Penalty:
    """What this kind costs in quality by the published evidence."""
    share = rank_share(kind.rank, model)
    found = penalty(kind.method, share, kind.states, model.parameters, kind.weights)
    found = found.doubted("int8 embedding and head") if kind.ends == "int8" else found
    return found.doubted("int8 sums") if kind.sums == "int8" else found


def rank_share(rank: Any, model: ModelConfig) -> float | None:
    """A rank as a share of the hidden size; the smallest of a table; None where there is none."""
    if isinstance(rank, dict):
        return min(rank_share(each, model) or 0.0 for each in rank.values())
    if rank is None:
        return None
    least = 1 / model.hidden_size  # a fraction of less is rounded up to one line
    return max(rank / model.hidden_size if isinstance(rank, int) else rank, least)


def _families_of(name: str, config: Config, model: ModelConfig) -> list[Family]:
    optimizer = config.optimizer
    ranks: tuple[Any, ...] = (None,)
    if takes_rank(name):
        ranks = _ranks_of(method_spec(name), config, model)
    elif optimizer.rank != "auto":
        method_options(optimizer.model_copy(update={"method": name}))  # says it has no rank
    ends: Ends = "int8" if config.train.ends == "int8" else "exact"
    sums: SumFormat = "fp32" if config.train.sums == "auto" else settled(config.train.sums)
    return [
        Family(name, states, weights, ranks, ends, sums)
        for states in _formats_of(name, optimizer)
        for weights in weight_formats(config)
    ]


def weight_formats(config: Config) -> tuple[WeightFormat, ...]:
    """Formats of the weights to try, exact ones first."""
    if config.train.weights != "auto":
        return (settled(config.train.weights),)
    return ("bf16", "int8") if config.train.device == "cuda" else ("fp32",)


def sum_formats(config: Config, kind: Kind) -> tuple[SumFormat, ...]:
    """Formats of the sums of gradients to try, exact ones first; the next only where one does not
    fit. Those in host memory are not among them: `search.py` tries them last of all.

    bf16 costs no quality: the published runs sum so, and round to nearest.
    """
    if config.train.sums != "auto":
        return (settled(config.train.sums),)
    coarser = config.train.device == "cuda" and not curvatures(kind, config.optimizer)
    return ("fp32", "bf16", "int8") if coarser else ("fp32",)


def _formats_of(name: str, optimizer: OptimizerConfig) -> list[str]:
    """Formats of the moments to try: what the user said, or the method's own and then 8-bit."""
    spec, wanted = method_spec(name), optimizer.states
    own = spec.arguments.get("states", OWN)
    if optimizer.method == "auto" and wanted not in ("auto", *spec.states):
        return []  # another method has it
    if wanted != "auto":
        return [wanted]
    return list(dict.fromkeys([own, *(["8bit"] if "8bit" in spec.states else [])]))


def _ranks_of(spec: MethodSpec, config: Config, model: ModelConfig) -> tuple[Any, ...]:
    """Ranks to try: the sheet's and less, or every one if the largest that fits is wanted."""
    wanted, h = config.optimizer.rank, model.hidden_size
    match wanted:
        case "fit":
            return tuple(range(1, h + 1))
        case "fit-fraction":
            return tuple(rank / h for rank in range(1, h))
        case "fit-mlp":
            return tuple({"attention": rank, "mlp": 2 * rank} for rank in range(1, h // 2 + 1))
        case "auto":
            most = _sheet_rank(spec, model)
            least = min(most, max(_SMALLEST_RANK, most // LEAST_SHARE))
            step = RANK_STEP if most >= RANK_STEP * LEAST_SHARE else 1
            return (*(rank for rank in range(least, most) if rank % step == 0), most)
    return (wanted,)


def _sheet_rank(spec: MethodSpec, model: ModelConfig) -> int:
    """The sheet's rank, as a share of the hidden size of the model it was used with."""
    size = spec.recipe_size(model.parameters)
    rank = spec.recipe(model.parameters).get("rank")
    if size == "any" or rank is None:
        most = model.hidden_size // _SHARE
        return max(1, most if rank is None else min(rank, most))
    return max(1, round(rank * model.hidden_size / read_preset(f"llama-{size}").hidden_size))


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
    chosen that and left the place open, and where it was asked for.
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
            found.append(Way(mode, place=_settled_place(config)))
    return found


def _open(config: Config, given: T | Auto, both: tuple[T, ...]) -> tuple[T, ...]:
    """What was given, or both where that is open; a CPU has no other memory than the host's."""
    if given != "auto":
        return (settled(given),)
    return both if config.train.device == "cuda" else both[:1]


def _settled_place(config: Config) -> StatePlace:
    return "device" if config.optimizer.place == "auto" else settled(config.optimizer.place)


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
    if config.train.boundaries != "auto" or config.train.blocks == "host":
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


def check_places(config: Config) -> None:
    """ConfigError where something is to live in host memory that the update mode needs always."""
    update = config.train.update
    if config.train.boundaries != "auto" and update not in ("auto", "layer-major"):
        raise ConfigError(
            f'train.boundaries = "{config.train.boundaries}" with train.update = "{update}"',
            "only in layer-major order do the inputs of blocks wait for other micro-batches",
            "--update layer-major, or no --boundaries",
        )
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


def clip_of(config: Config, mode: UpdateMode) -> float | None:
    """The gradient norm limit of that mode; None is off."""
    clip = config.train.clip
    if clip == "auto":
        return None if mode in MOVE_EARLY else CLIP
    return clip if isinstance(clip, float) else None
