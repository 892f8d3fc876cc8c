"""What may be varied, best first, and what the user's own settings leave of it.

A family is a method with formats of moments and weights, and the ranks that it may have. Families
are ordered by the published evidence (`quality.py`) for their largest rank, which is what the
method's sheet says for a model of that size unless the user wants the largest that fits.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lowmem.config.presets import read_preset
from lowmem.config.schema import (
    Config,
    Ends,
    ModelConfig,
    OptimizerConfig,
    SumFormat,
    WeightFormat,
    settled,
)
from lowmem.errors import ConfigError
from lowmem.optim.assign import method_options, takes_rank
from lowmem.optim.method import ByRole
from lowmem.optim.methods import METHODS, MethodSpec, build_method, method_spec
from lowmem.optim.methods.spec import SHEET_ONLY
from lowmem.planner.quality import Penalty, automatic, penalty

LEAST_SHARE = 8  # of the sheet's rank, below which the planner does not go unasked
RANK_STEP = 8  # tensor cores want multiples of it; of small ranks every one is tried
_SMALLEST_RANK = 4  # unless the sheet says less
_SHARE = 4  # rank is a quarter of the hidden size where a sheet has one for no size
_ONE_SETTING = {"alpha", "scale"}  # APOLLO's scale is alpha squared; others have only one of them
OWN = "own"  # states of a method that leaves no choice


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
