"""A rehearsed step against the same step on real tensors, to the byte."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.presets import read_preset
from lowmem.config.schema import MOVE_EARLY, ModelConfig, OptimizerConfig
from lowmem.kernels.slices import SLICE_ELEMENTS
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.step import MadeAnew, gather
from lowmem.planner.live_bytes import LiveBytes
from lowmem.planner.persistent import track_persistent
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import rehearse

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
SLOW_INT8 = pytest.param("int8", marks=pytest.mark.slow)
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"method": "adamw"},
    "adamw-bf16": {"method": "adamw", "states": "bf16"},
    "adam8bit": {"method": "adam8bit"},
    "galore": {"method": "galore", "rank": 16},
    "galore-fraction": {"method": "galore", "rank": 0.25, "side": "reverse_std"},
    "galore-8bit": {"method": "galore", "rank": {"attention": 8, "mlp": 24}, "states": "8bit"},
}


def choice(mode: Any, level: Any, weights: Any, accumulate: int) -> Choice:
    clip = None if mode in MOVE_EARLY else 1.0
    return Choice("", None, "", weights, mode, level, 2, accumulate, clip)


def real_peak(
    optimizer_config: OptimizerConfig, how: Choice, seq_len: int, shape: ModelConfig = MODEL
) -> int:
    """The tracker's peak over two updates on CPU tensors."""
    return real_update(optimizer_config, how, seq_len, shape).peak


def real_update(
    optimizer_config: OptimizerConfig, how: Choice, seq_len: int, shape: ModelConfig = MODEL
) -> LiveBytes:
    """The tracker of two updates on CPU tensors."""
    model = Llama(
        shape,
        dtype=compute_dtype(how.weights, "cpu"),
        device="cpu",
        int8=how.weights == "int8",
        int8_ends=how.ends == "int8",
        recompute=how.recompute,
        keep_logits=how.logits == "keep",
        boundaries=how.boundaries,
        blocks=how.blocks,
        matmul=how.matmul,
    )
    model.initialise(0)
    optimizer = build_optimizer(
        optimizer_config.model_copy(update={"place": how.place}),
        model.weights(),
        model.roles(),
        mode=how.update,
        seed=0,
        head_dim=shape.head_dim,
        sums=how.sums,
    )
    hold_worst_window(optimizer)  # as a rehearsal does
    optimizer.attach(model)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(how.accumulate):
            yield tuple(torch.ones(2, seq_len, dtype=torch.int64) for _ in range(2))  # type: ignore[misc]

    tracker = LiveBytes("cpu")
    track_persistent(tracker, optimizer)
    with tracker:
        for _ in range(2):
            loss_and_norm = gather(
                model,
                optimizer,
                MadeAnew(batches),
                count=how.accumulate,
                tokens=100,
                lr=0.01,
                clip=how.clip,
            )
            optimizer.step()
            del loss_and_norm  # alive until here, as in training
    return tracker


@pytest.mark.parametrize("weights", ["fp32", "bf16", SLOW_INT8])
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


@pytest.mark.parametrize("sums", ["bf16", "int8", "host"])
@pytest.mark.parametrize(
    ("method", "mode", "weights", "tied"),
    [
        ("adam8bit", "unfused", "bf16", True),
        ("scale", "fused+subspace", "bf16", False),
        ("galore", "unfused", "int8", False),
        ("galore", "fused+subspace", "bf16", True),
        ("frugal", "unfused", "bf16", False),
    ],
)
def test_sums_of_other_formats_are_rehearsed_to_the_byte(
    method: str, mode: str, weights: str, tied: bool, sums: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 192)
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", 4096)  # more slices than a rehearsal visits
    optimizer = OptimizerConfig.model_validate({"method": method})
    shape = MODEL.model_copy(update={"num_hidden_layers": 1, "tie_word_embeddings": tied})
    how = replace(choice(mode, "full", weights, 3), sums=sums)
    rehearsed = rehearse(shape, optimizer, how, 32, attention="cpu")
    real = real_update(optimizer, how, 32, shape)
    assert (rehearsed.tensors, rehearsed.host) == (real.peak, real.host_peak)
    assert bool(rehearsed.host) == (sums == "host")


@pytest.mark.parametrize("level", ["keep", "attn", "full", "keep:2,full"])
@pytest.mark.parametrize(
    ("mode", "accumulate"), [("unfused", 3), ("fused+subspace", 3), ("fused", 1)]
)
def test_block_inputs_in_host_memory_are_rehearsed_to_the_byte(
    mode: str, accumulate: int, level: str
) -> None:
    """On the device and on the host, where there are 7 of 2 x 32 tokens and a page to align."""
    shape = MODEL.model_copy(update={"num_hidden_layers": 8, "vocab_size": 100})
    optimizer = OptimizerConfig.model_validate(METHODS["adam8bit"])
    stays = choice(mode, level, "bf16", accumulate)
    goes = replace(stays, boundaries="host")
    rehearsed = rehearse(shape, optimizer, goes, 32, attention="cpu")
    real = real_update(optimizer, goes, 32, shape)
    assert (rehearsed.tensors, rehearsed.host) == (real.peak, real.host_peak)
    x = 2 * 32 * shape.hidden_size * 2
    assert rehearsed.host == 7 * (x + 4096)
    # Of 8 inputs the last block's stays, and one comes ahead.
    saved = rehearse(shape, optimizer, stays, 32, attention="cpu").tensors - rehearsed.tensors
    assert 0 < saved <= 6 * x if mode == "fused" else saved >= 0


@pytest.mark.parametrize("weights", ["bf16", SLOW_INT8])
@pytest.mark.parametrize(
    ("boundaries", "place", "blocks"),
    [("keep", "device", "device"), ("host", "host", "device"), ("host", "host", "host")],
)
@pytest.mark.parametrize("micro_batches", [1, 2, 6])  # of the last only four are rehearsed
@pytest.mark.parametrize("method", ["galore-8bit", "frugal"])
def test_layer_major_order_is_rehearsed_to_the_byte(
    method: str,
    micro_batches: int,
    boundaries: Any,
    place: Any,
    blocks: Any,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the device and, counted apart, in host memory."""
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 192)
    optimizer = OptimizerConfig.model_validate(METHODS.get(method, {"method": method}))
    how = choice("layer-major", "full", weights, micro_batches)
    how = replace(how, boundaries=boundaries, place=place, blocks=blocks)
    shape = MODEL.model_copy(update={"tie_word_embeddings": micro_batches == 2})
    rehearsed = rehearse(shape, optimizer, how, 32, attention="cpu")
    real = real_update(optimizer, how, 32, shape)
    assert (rehearsed.tensors, rehearsed.host) == (real.peak, real.host_peak)
    assert bool(rehearsed.host) == (boundaries == "host")
    assert sum(rehearsed.parts.values()) == rehearsed.tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("logits", ["keep", "recompute"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mode", "accumulate"), [("unfused", 1), ("fused+subspace", 3), ("fused", 1)]
)
@pytest.mark.parametrize("method", ["adam8bit", "scale"])  # by rows, and one that wants columns
def test_slices_of_the_vocabulary_are_rehearsed_to_the_byte(
    method: str,
    mode: str,
    accumulate: int,
    weights: str,
    logits: Any,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 192)
    optimizer = OptimizerConfig.model_validate({"method": method})
    shape = MODEL.model_copy(update={"num_hidden_layers": 1, "tie_word_embeddings": tied})
    how = replace(choice(mode, "full", weights, accumulate), logits=logits)
    rehearsed = rehearse(shape, optimizer, how, 32, attention="cpu")
    assert rehearsed.tensors == real_peak(optimizer, how, 32, shape)


@pytest.mark.parametrize(("width", "tied"), [(64, True), (128, False)])  # rows inside of groups
@pytest.mark.parametrize(
    ("mode", "accumulate"), [("unfused", 1), ("fused+subspace", 3), ("fused", 1)]
)
@pytest.mark.parametrize("rest", ["adam8bit", "scale", "apollo_mini"])
def test_ends_in_codes_are_rehearsed_to_the_byte(
    rest: str, mode: str, accumulate: int, width: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 192)
    optimizer = OptimizerConfig.model_validate({"method": "apollo_mini", "rest": {"method": rest}})
    changes = {"num_hidden_layers": 1, "tie_word_embeddings": tied, "hidden_size": width}
    shape = MODEL.model_copy(update=changes)
    how = replace(choice(mode, "full", "int8", accumulate), ends="int8")
    rehearsed = rehearse(shape, optimizer, how, 32, attention="cpu")
    assert rehearsed.tensors == real_peak(optimizer, how, 32, shape)


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
@pytest.mark.parametrize(("mode", "accumulate"), [("fused", 1), ("fused+subspace", 3)])
def test_codes_are_made_floats_slice_by_slice_on_meta_as_in_fact(
    mode: str, accumulate: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six slices and more to a matrix, of which meta visits three."""
    monkeypatch.setattr("lowmem.kernels.int8_linear.SLICE_ELEMENTS", 2**11)
    optimizer = OptimizerConfig.model_validate(METHODS["galore-8bit"])
    how = choice(mode, level, "int8", accumulate)
    rehearsed = rehearse(MODEL, optimizer, how, 32, attention="cpu")
    assert rehearsed.tensors == real_peak(optimizer, how, 32)


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("mode", "level"), [("fused", "keep"), ("unfused", "full")])
def test_products_in_8_bits_are_rehearsed_to_the_byte(
    mode: Any, level: str, weights: Any, matmul: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", 2048)
    shape = MODEL.model_copy(update={"vocab_size": 50})  # so that blocks make the peak
    how = replace(choice(mode, level, weights, 2 if mode == "unfused" else 1), matmul=matmul)
    config = OptimizerConfig.model_validate(METHODS["adamw"])
    rehearsed = rehearse(shape, config, how, 20, attention="cpu").tensors
    assert rehearsed == real_peak(config, how, 20, shape)
    exact = rehearse(shape, config, replace(how, matmul="exact"), 20, attention="cpu").tensors
    assert mode == "fused" or rehearsed > exact  # with the gradients of all, a forward is highest


def test_weights_in_codes_are_counted_as_they_are_stored() -> None:
    """A byte an element, and five bytes for every 128 of them; the ends in the compute dtype."""
    seven = read_preset("llama-7b")
    how = choice("fused", "full", "int8", 1)
    optimizer = OptimizerConfig(method="scale")
    parts = rehearse(seven, optimizer, how, 256, attention="flash").parts
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    ends = 2 * 2 * 32000 * 4096 + 65 * 2 * 4096
    assert parts["weights"] == matrices + 5 * matrices // 128 + ends


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
    assert parts["states"] == states + 2 * (1024 + 24064)  # the maps and tables of 8-bit codes
    normals = 4 * 2**16  # the quantiles from which a first basis is drawn
    assert parts["projections"] == 7 * 32 * 2 * 4096 * 1024 + normals


def test_what_libraries_hold_is_part_of_every_moment() -> None:
    how, optimizer = choice("unfused", "keep", "bf16", 1), OptimizerConfig(method="adamw")
    without = rehearse(MODEL, optimizer, how, 64, attention="cpu")
    with_it = rehearse(MODEL, optimizer, how, 64, attention="cpu", workspace=2**20)
    assert with_it.parts == without.parts | {"workspace": 2**20}
    assert with_it.tensors == without.tensors + 2**20


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace", "fused"])
def test_every_kind_of_phase_has_its_worst_moment(mode: Any) -> None:
    how = choice(mode, "full", "bf16", 1)
    optimizer = OptimizerConfig(method="galore", rank=16)
    told = rehearse(MODEL, optimizer, how, 64, attention="cpu")
    assert {peak.phase for peak in told.phases} >= {"forward", "backward", "update", "evaluation"}
    assert [peak.tensors for peak in told.phases] == sorted(
        (peak.tensors for peak in told.phases), reverse=True
    )
    first = told.phases[0]
    assert (first.tensors, first.parts, first.instant) == (told.tensors, told.parts, told.instant)
    for peak in told.phases:
        assert sum(peak.parts.values()) == peak.tensors
