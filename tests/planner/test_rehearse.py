"""A rehearsed step against the same step on real tensors, to the byte."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.presets import read_preset
from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.step import MadeAnew, gather
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import DTYPES, LiveBytes, part_of, rehearse, track_persistent

MODEL = ModelConfig.model_validate(
    {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
)
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"method": "adamw"},
    "adamw-bf16": {"method": "adamw", "states": "bf16"},
    "adam8bit": {"method": "adam8bit"},
    "galore": {"method": "galore", "rank": 16},
    "galore-fraction": {"method": "galore", "rank": 0.25, "side": "reverse_std"},
    "galore-8bit": {"method": "galore", "rank": {"attention": 8, "mlp": 24}, "states": "8bit"},
}


def choice(mode: Any, level: Any, weights: Any, accumulate: int) -> Choice:
    clip = None if mode == "fused" else 1.0
    return Choice("", None, "", weights, mode, level, 2, accumulate, clip)


def real_peak(optimizer_config: OptimizerConfig, how: Choice, seq_len: int) -> int:
    """The tracker's peak over two updates on CPU tensors."""
    model = Llama(MODEL, dtype=DTYPES[how.weights], device="cpu", recompute=how.recompute)
    model.initialise(0)
    weights = dict(model.named_parameters())
    optimizer = build_optimizer(
        optimizer_config,
        weights,
        model.roles(),
        mode=how.update,
        seed=0,
        head_dim=MODEL.head_dim,
    )
    hold_worst_window(optimizer)  # as a rehearsal does
    optimizer.attach(model)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(how.accumulate):
            yield tuple(torch.ones(2, seq_len, dtype=torch.int64) for _ in range(2))  # type: ignore[misc]

    tracker = LiveBytes("cpu")
    track_persistent(tracker, model, optimizer)
    with tracker:
        for _ in range(2):
            made = gather(
                model,
                optimizer,
                MadeAnew(batches),
                count=how.accumulate,
                tokens=100,
                lr=0.01,
                clip=how.clip,
            )
            optimizer.step()
            del made  # alive until here, as in training
    return tracker.peak


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mode", "accumulate"),
    [("unfused", 1), ("unfused", 3), ("fused+subspace", 1), ("fused+subspace", 3), ("fused", 1)],
)
@pytest.mark.parametrize("method", METHODS)
def test_meta_equals_real_to_the_byte(
    method: str, mode: str, accumulate: int, weights: str
) -> None:
    optimizer = OptimizerConfig.model_validate(METHODS[method])
    # One level per case keeps this fast; all levels meet all modes over the methods.
    level = ("keep", "attn", "full")[(list(METHODS).index(method) + accumulate) % 3]
    how = choice(mode, level, weights, accumulate)
    rehearsed = rehearse(MODEL, optimizer, how, 32, attention="cpu")
    assert rehearsed.tensors == real_peak(optimizer, how, 32)
    assert sum(rehearsed.parts.values()) == rehearsed.tensors


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", ["sophia", "adahessian"])
def test_estimates_of_the_curvature_are_rehearsed_to_the_byte(
    method: str, accumulate: int, weights: str
) -> None:
    if (method, weights) == ("adahessian", "bf16"):
        pytest.skip("refused")
    optimizer = OptimizerConfig.model_validate({"method": method})
    how = choice("unfused", "full", weights, accumulate)
    rehearsed = rehearse(MODEL, optimizer, how, 32, attention="cpu")
    assert rehearsed.tensors == real_peak(optimizer, how, 32)


def test_persistent_bytes_of_7b_are_those_of_the_formula() -> None:
    """Written out by hand for GaLore rank 1024 with 8-bit moments and bf16 weights."""
    seven = read_preset("llama-7b")
    optimizer = OptimizerConfig(method="galore", rank=1024, states="8bit")
    how = choice("fused", "full", "bf16", 1)
    parts = rehearse(seven, optimizer, how, 256, attention="flash").parts
    big = {(4096, 4096): 4 * 32, (11008, 4096): 3 * 32}

    def moments(count: int) -> int:  # codes and scales, each rounded up to 512 bytes
        return 2 * (count + -(-4 * (count // 256) // 512) * 512)

    states = sum(n * moments(shape[0] * 1024) for shape, n in big.items())
    states += 2 * moments(32000 * 4096) + 65 * moments(4096)
    states += 7 * 32 * 3 * 512  # figures for the log: energy, overlap, kept bases
    assert parts["weights"] == 2 * seven.parameters
    assert parts["states"] == states + 4 * 1024  # the lookup tables of the 8-bit maps
    normals = 4 * 2**16  # the quantiles from which a first basis is drawn
    assert parts["projections"] == 7 * 32 * 2 * 4096 * 1024 + normals


def test_a_rehearsal_costs_no_host_memory() -> None:
    """A factory that does not name its device would fill real gigabytes."""
    with pytest.raises(RuntimeError, match="real memory during a rehearsal"), LiveBytes("meta"):
        torch.zeros(2**20)


def test_the_peak_names_its_moment_and_its_parts() -> None:
    tracker = LiveBytes("cpu")
    weight = torch.empty(1000, dtype=torch.uint8)
    tracker.track([weight], "weights")
    with tracker:
        first = torch.zeros(256)
        second = torch.zeros(512)
        del first
        third = torch.zeros(10)
    assert tracker.peak == 1024 + 1024 + 2048
    assert tracker.peak_parts == {"weights": 1024, "activations": 3072}
    assert tracker.live == 1024 + 2048 + 512
    del second, third
    assert [size for _, size in tracker.events] == [1024, 1024, 2048, -1024, 512, -2048, -512]


def test_parts_follow_the_innermost_phase() -> None:
    assert part_of(("backward of block 3", "gradient of mlp.down")) == "gradients"
    assert part_of(("gradient of mlp.down", "hold")) == "gradients"
    assert part_of(("gradient of mlp.down", "update")) == "update"
    assert part_of(("forward of block 3",)) == "activations"
    assert part_of(("loss",)) == "loss"
