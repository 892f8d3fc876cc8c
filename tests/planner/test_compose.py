"""Composed peaks against rehearsals of the whole model, to the byte."""

from dataclasses import replace
from typing import Any

import pytest

from lowmem.config.presets import read_preset
from lowmem.config.schema import Config, ModelConfig, OptimizerConfig
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import rehearse

SEQ_LEN = 64
MODES = [("unfused", 1), ("unfused", 3), ("fused+subspace", 1), ("fused+subspace", 3), ("fused", 1)]
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"rank": None, "states": "fp32"},
    "galore": {"rank": 16, "states": "8bit"},
    "apollo": {"rank": 8, "states": "fp32"},
    "cosmos": {"rank": {"attention": 8, "mlp.down": 4, "mlp": 12}, "states": "bf16"},
    "frugal": {"rank": None, "states": "fp32"},  # moments move between blocks
}
RECOMPUTE = ["keep", "attn", "full", "keep:2,attn:2,full"]


def model(blocks: int, **changes: Any) -> ModelConfig:
    fields = read_preset("llama-9m").model_dump() | {"num_hidden_layers": blocks} | changes
    return ModelConfig.model_validate(fields)


def both(config: ModelConfig, how: Choice, attention: str, rest: str = "auto") -> tuple[int, int]:
    """(composed, rehearsed)."""
    card = find_card("24GB", "cuda")
    rows = how.micro_batch * how.accumulate
    job = Job(Config(), card, config, rows, SEQ_LEN, attention)
    optimizer = OptimizerConfig.model_validate(
        {
            "method": how.method,
            "rank": how.rank or "auto",
            "states": how.states,
            "rest": {"method": rest},
        }
    )
    job = replace(job, config=Config(optimizer=OptimizerConfig(rest=optimizer.rest)))
    whole = rehearse(config, optimizer, how, SEQ_LEN, attention=attention)
    return job.tensors(how) - job.workspace, whole.tensors


def choice(
    method: str,
    mode: Any,
    accumulate: int,
    recompute: str,
    micro: int = 2,
    logits: Any = "recompute",
) -> Choice:
    clip = None if mode == "fused" else 1.0
    return Choice(
        method,
        weights="bf16",
        update=mode,
        recompute=recompute,
        micro_batch=micro,
        accumulate=accumulate,
        clip=clip,
        logits=logits,
        **METHODS[method],
    )


@pytest.mark.parametrize("attention", ["cpu", "flash"])
@pytest.mark.parametrize(("mode", "accumulate"), MODES)
@pytest.mark.parametrize("method", METHODS)
def test_composed_is_rehearsed(method: str, mode: str, accumulate: int, attention: str) -> None:
    # One level per case keeps this fast; all levels meet all modes over the methods.
    recompute = RECOMPUTE[(list(METHODS).index(method) + accumulate) % len(RECOMPUTE)]
    composed, rehearsed = both(model(5), choice(method, mode, accumulate, recompute), attention)
    assert composed == rehearsed


@pytest.mark.parametrize("rest", ["adam8bit", "apollo_mini"])
@pytest.mark.parametrize(("mode", "accumulate"), MODES)
def test_composed_is_rehearsed_with_ends_in_codes(mode: str, accumulate: int, rest: str) -> None:
    how = replace(choice("galore", mode, accumulate, "full"), weights="int8", ends="int8")
    composed, rehearsed = both(model(5), how, "flash", rest)
    assert composed == rehearsed
