"""What may be varied, best first, and what the user's own settings leave of it.

The order of methods is that of the published evidence (`quality.py`); a named method has only its
ranks and formats to vary. Ranks begin at what the method's sheet says for a model of that size and
go downwards; moments begin in the method's own format.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lowmem.config.presets import read_preset
from lowmem.config.schema import Config, Level, ModelConfig, OptimizerConfig, UpdateMode, settled
from lowmem.errors import ConfigError
from lowmem.optim.assign import method_options, takes_rank
from lowmem.optim.method import ByRole
from lowmem.optim.methods import METHODS, MethodSpec, build_method, method_spec
from lowmem.planner.quality import Penalty, automatic, penalty

RANK_DIVISORS = (1, 2, 4, 8)  # of the sheet's rank
_SMALLEST_RANK = 4  # unless the sheet says less
_SHARE = 4  # rank is a quarter of the hidden size where a sheet has one for no size
_ONE_SETTING = {"alpha", "scale"}  # APOLLO's scale is alpha squared; others have only one of them
OWN = "own"  # states of a method that leaves no choice
CLIP = 1.0  # where nobody says otherwise and the norm is known before weights move


@dataclass(frozen=True)
class Kind:
    """What decides quality: method, rank and moments."""

    method: str
    rank: Any
    states: str

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


def sheet_settings(method: str, parameters: int, given: Collection[str]) -> dict[str, Any]:
    """What the method's sheet says for a model of that size of arguments that are not `given`.

    Without lr, which is no argument, and rank and format, which are the planner's choice.
    """
    settled_otherwise = {"lr", "rank", "states", *given}
    if not _ONE_SETTING.isdisjoint(given):
        settled_otherwise |= _ONE_SETTING
    found = method_spec(method).recipe(parameters).items()
    chosen = {k: v for k, v in found if k not in settled_otherwise}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}


def kinds(config: Config, model: ModelConfig) -> list[Kind]:
    """Every kind that the user's settings allow, best first. ConfigError: unsuitable settings."""
    optimizer = config.optimizer
    if optimizer.method == "auto":
        return _automatic(optimizer, model)
    found = _kinds_of(optimizer.method, optimizer, model)
    for kind in found:  # a wrong option is told before anything is rehearsed
        kind.built(optimizer, model.parameters)
    return found


def _automatic(optimizer: OptimizerConfig, model: ModelConfig) -> list[Kind]:
    """Kinds of every method with evidence that takes the user's settings, in order of quality.

    Equal in quality: in the order of METHODS, large ranks and exact moments first.
    """
    names = automatic(list(METHODS), ranked=optimizer.rank != "auto")
    able = [
        name for name in names if optimizer.options.keys() <= method_spec(name).arguments.keys()
    ]
    found: list[Kind] = []
    problem: ConfigError | None = None
    for name in able or names:  # an option that none has is told below
        for kind in _kinds_of(name, optimizer, model):
            try:
                kind.built(optimizer, model.parameters)
                found.append(kind)
            except ConfigError as error:  # it may suit another method
                problem = problem or error
    if not found and problem is not None:
        raise problem
    return sorted(found, key=lambda kind: quality(kind, model).rung)


def quality(kind: Kind, model: ModelConfig) -> Penalty:
    """What this kind costs in quality by the published evidence."""
    return penalty(kind.method, rank_share(kind.rank, model), kind.states, model.parameters)


def rank_share(rank: Any, model: ModelConfig) -> float | None:
    """A rank as a share of the hidden size; the smallest of a table; None where there is none."""
    if isinstance(rank, dict):
        return min(rank_share(each, model) or 0.0 for each in rank.values())
    return rank / model.hidden_size if isinstance(rank, int) else rank


def _kinds_of(name: str, optimizer: OptimizerConfig, model: ModelConfig) -> list[Kind]:
    formats = _formats_of(name, optimizer)
    if not takes_rank(name):
        if optimizer.rank != "auto":
            method_options(optimizer.model_copy(update={"method": name}))  # says it has no rank
        return [Kind(name, None, states) for states in formats]
    ranks = _ranks_of(method_spec(name), model) if optimizer.rank == "auto" else [optimizer.rank]
    return [Kind(name, rank, states) for rank in ranks for states in formats]


def _formats_of(name: str, optimizer: OptimizerConfig) -> list[str]:
    """Formats of the moments to try: what the user said, or the method's own and then 8-bit."""
    spec, wanted = method_spec(name), optimizer.states
    own = spec.arguments.get("states", OWN)
    if optimizer.method == "auto" and wanted not in ("auto", *spec.states):
        return []  # another method has it
    if wanted != "auto":
        return [wanted]
    if optimizer.method == "auto" and not takes_rank(name):
        return [own]  # 8-bit AdamW has a name of its own
    return list(dict.fromkeys([own, *(["8bit"] if "8bit" in spec.states else [])]))


def _ranks_of(spec: MethodSpec, model: ModelConfig) -> list[Any]:
    """The sheet's rank, as a share of the hidden size of the model it was used with, and below."""
    size = spec.recipe_size(model.parameters)
    rank = spec.recipe(model.parameters).get("rank")
    if isinstance(rank, float):
        return [rank / divisor for divisor in RANK_DIVISORS]
    if size == "any" or rank is None:
        most = model.hidden_size // _SHARE
        first = most if rank is None else min(rank, most)
    else:
        first = round(rank * model.hidden_size / read_preset(f"llama-{size}").hidden_size)
    least = _SMALLEST_RANK if rank is None else min(rank, _SMALLEST_RANK)
    return list(dict.fromkeys(max(least, first // divisor) for divisor in RANK_DIVISORS))


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
    weights = config.train.weights
    if "hutchinson" in asked and weights not in ("auto", "fp32"):
        raise ConfigError(
            f'train.weights = "{weights}" with method {asked["hutchinson"]!r}',
            f"it measures the Hessian by moving every weight by a thousandth, and {weights} rounds "
            "most of that away",
            "--weights fp32, or method sophia, which moves nothing",
        )


def modes(config: Config, kind: Kind, rows: int) -> list[UpdateMode]:
    """Update modes that do what was asked, best first. ConfigError for contradictions."""
    wanted, clip = config.train.update, config.train.clip
    asked = curvatures(kind, config.optimizer)
    if asked:
        check_curvature(config, asked)
        return ["unfused"]
    if wanted == "fused":
        check_fused(config, rows)
    if wanted != "auto":
        return [settled(wanted)]
    found: list[UpdateMode] = ["unfused"]
    if sums_projected(kind, config.optimizer):
        found.append("fused+subspace")
    if not isinstance(clip, float) and config.train.micro_batch in ("auto", rows):
        found.append("fused")
    return found


def check_fused(config: Config, rows: int) -> None:
    """ConfigError where `fused` cannot do what else was asked."""
    if isinstance(config.train.clip, float):
        raise ConfigError(
            f'train.clip = {config.train.clip} with train.update = "fused"',
            "the gradient is never in memory as a whole, and its norm is known only after the "
            "last weights have changed",
            "--clip off, or --update fused+subspace",
        )
    micro = config.train.micro_batch
    if micro != "auto" and settled(micro) < rows:
        raise ConfigError(
            f'train.update = "fused" cannot accumulate {rows} sequences, {micro} at a time',
            "every weight changes as soon as its gradient is there: one micro-batch per update",
            f"--batch {micro}seq, or --update fused+subspace",
        )


def levels(config: Config) -> list[Level]:
    """Recomputation levels, fastest first."""
    if config.train.recompute != "auto":
        return [settled(config.train.recompute)]
    return ["keep", "attn", "full"]


def clip_of(config: Config, mode: UpdateMode) -> float | None:
    """The gradient norm limit of that mode; None is off."""
    clip = config.train.clip
    if clip == "auto":
        return None if mode == "fused" else CLIP
    return clip if isinstance(clip, float) else None
