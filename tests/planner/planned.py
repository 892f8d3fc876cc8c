"""The planner's composed bytes for a configuration, as the tests with numbers of their own ask."""

from typing import Any

from lowmem.config.presets import read_preset
from lowmem.config.schema import Config, ModelConfig
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Choice

LLAMA3_8B = ModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def model_named(name: str) -> ModelConfig:
    return LLAMA3_8B if name == "llama3-8b" else read_preset(f"llama-{name}")


def planned(
    model: ModelConfig, choice: Choice, length: int, rest: str, **options: Any
) -> tuple[int, int]:
    """(weights and states, peak of tensors) on a CUDA device, without what libraries hold.

    rest: moments of embedding, head and norms. options: other arguments of the method.
    """
    config = Config.model_validate(
        {"optimizer": {"rest": {"states": rest}, "options": options}, "train": {"device": "cuda"}}
    )
    rows = choice.micro_batch * choice.accumulate
    job = Job(config, find_card("24GB", "cuda"), model, rows, length, "flash")
    return (
        job.persistent(kind_of(choice)) - job.workspace,
        job.tensors(choice) - job.workspace,
    )
