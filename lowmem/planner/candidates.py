"""What may be varied, best first, and what the user's own settings leave of it.

The order of methods follows published quality at equal tokens: tuned AdamW, then 8-bit Adam (equal
at 7B: 14.61), then GaLore (14.65) with the rank of its paper, a quarter of the hidden size, and
downwards. Sources: arXiv:2403.03507, Tables 2 and 3; arXiv:2110.02861.
"""

from dataclasses import dataclass
from typing import Any

from lowmem.config.schema import Config, Level, ModelConfig, OptimizerConfig, UpdateMode, settled
from lowmem.errors import ConfigError
from lowmem.optim.assign import method_options, takes_rank
from lowmem.optim.methods import build_method, method_spec

RANK_DIVISORS = (4, 8, 16, 32)
CLIP = 1.0  # where nobody says otherwise and the norm is known before weights move


@dataclass(frozen=True)
class Kind:
    """What decides quality: method, rank and moments."""

    method: str
    rank: Any
    states: str

    def optimizer(self, config: OptimizerConfig) -> OptimizerConfig:
        """`config` with this method, rank and format."""
        rank = "auto" if self.rank is None else self.rank
        return config.model_copy(
            update={"method": self.method, "rank": rank, "states": self.states}
        )


def kinds(config: Config, model: ModelConfig) -> list[Kind]:
    """Every kind that the user's settings allow, best first. ConfigError: unsuitable settings."""
    optimizer = config.optimizer
    names = ["adamw", "adam8bit", "galore"] if optimizer.method == "auto" else [optimizer.method]
    if optimizer.method == "auto":
        wanted = {*optimizer.options, *([] if optimizer.rank == "auto" else ["rank"])}
        able = [name for name in names if wanted <= set(method_spec(name).arguments)]
        names = able or names  # an option that none has is told below
    found = [kind for name in names for kind in _kinds_of(name, optimizer, model)]
    for kind in found:  # a wrong option is told before anything is rehearsed
        build_options = method_options(kind.optimizer(optimizer))
        if isinstance(build_options.get("rank"), float):
            build_options["rank"] = 1
        build_method(kind.method, build_options)
    return found


def _kinds_of(name: str, optimizer: OptimizerConfig, model: ModelConfig) -> list[Kind]:
    own = method_spec(name).arguments["states"]
    wanted = optimizer.states
    if wanted != "auto":
        formats: list[str] = [wanted]
    else:
        formats = [own] if name != "galore" else ["fp32", "8bit"]
    if optimizer.method == "auto" and own == "8bit" and wanted not in ("auto", "8bit"):
        return []
    if not takes_rank(name):
        if optimizer.rank != "auto":
            method_options(optimizer.model_copy(update={"method": name}))  # says it has no rank
        return [Kind(name, None, states) for states in formats]
    if optimizer.rank != "auto":
        ranks: list[Any] = [optimizer.rank]
    else:
        sizes = (max(4, model.hidden_size // divisor) for divisor in RANK_DIVISORS)
        ranks = list(dict.fromkeys(sizes))
    return [Kind(name, rank, states) for rank in ranks for states in formats]


def modes(config: Config, kind: Kind, rows: int) -> list[UpdateMode]:
    """Update modes that do what was asked, best first. ConfigError for contradictions."""
    wanted, clip = config.train.update, config.train.clip
    if wanted == "fused":
        check_fused(config, rows)
    if wanted != "auto":
        return [settled(wanted)]
    found: list[UpdateMode] = ["unfused"]
    if takes_rank(kind.method):
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
