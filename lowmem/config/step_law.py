"""The Step Law: learning rate and batch of AdamW from the size of the model and of the run.

    step_law(weights=25.3e6, tokens=1.31e9)    rate 5.9e-3, 93k tokens per update

Source: Predictable Scale, Part I, arXiv:2503.04715; from runs of AdamW on sequences of 2,048.
"""

import math
from dataclasses import dataclass

from lowmem.config.schema import Config, ModelConfig
from lowmem.errors import ConfigError
from lowmem.units import format_count

STEP_LAW = "step-law"
_METHODS = ("adamw", "adam8bit")
_FITTED_WEIGHTS, _FITTED_TOKENS = (60e6, 1e9), (2e9, 100e9)
_NEAR = 2.0  # the optimum is flat: the law's rate stands for batches up to this factor from its own


@dataclass(frozen=True)
class Law:
    """batch: tokens per update."""

    rate: float
    batch: float


def step_law(weights: float, tokens: float) -> Law:
    """weights: of the model without embedding and head. tokens: of the whole training."""
    return Law(1.79 * weights**-0.713 * tokens**0.307, 0.58 * tokens**0.571)


def rate_by_law(
    config: Config, model: ModelConfig, rows: int, seq_len: int, updates: int
) -> tuple[float, str]:
    """(learning rate, how it came about) of a run. ConfigError: not by AdamW."""
    if config.optimizer.method not in _METHODS:
        raise ConfigError(
            f'optimizer.lr = "{STEP_LAW}" with optimizer.method = "{config.optimizer.method}"',
            "the law was fitted on runs of AdamW; other methods need other rates",
            "--method adamw, or leave --lr out: then it is that of the method's authors",
        )
    heads = 1 if model.tie_word_embeddings else 2
    weights = model.parameters - heads * model.vocab_size * model.hidden_size
    used = rows * seq_len
    law = step_law(weights, used * updates)
    rate, scaled = law.rate, ""
    if not 1 / _NEAR <= used / law.batch <= _NEAR:
        rate *= math.sqrt(used / law.batch)
        scaled = f"; {law.rate:.3g} there, and times sqrt(batch / that batch) here"
    fitted = all(
        least <= value <= most
        for value, (least, most) in (
            (weights, _FITTED_WEIGHTS),
            (used * updates, _FITTED_TOKENS),
        )
    )
    outside = (
        "" if fitted else "; outside of what it was fitted on, 60M to 1B and 2B to 100B tokens"
    )
    return rate, (
        f"lr {rate:.3g}: by the step law, 1.79 N^-0.713 D^0.307 with N = {format_count(weights)} "
        f"weights without embedding and head and D = {format_count(used * updates)} tokens "
        f"(arXiv:2503.04715); its batch: {max(1, round(law.batch / seq_len))}seq{scaled}{outside}"
    )
