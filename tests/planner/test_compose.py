"""Composed peaks against rehearsals of the whole model, to the byte."""

import random
from dataclasses import replace
from typing import Any

import pytest

from lowmem.config.presets import read_preset
from lowmem.config.schema import MOVE_EARLY, Config, ModelConfig, OptimizerConfig
from lowmem.kernels import random_normal
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job, kind_of
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
    config_of_rest = OptimizerConfig.model_validate({"rest": {"method": rest}})
    job = replace(job, config=Config(optimizer=config_of_rest))
    optimizer = job.optimizer(kind_of(how))  # with what the method's sheet says
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
    clip = None if mode in MOVE_EARLY else 1.0
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


@pytest.mark.parametrize(("matmul", "mode"), [("int8", "unfused"), ("fp8", "fused+subspace")])
def test_products_in_8_bits_compose(matmul: Any, mode: str) -> None:
    how = choice("apollo", mode, 2, "attn:2,full")
    small = model(5, vocab_size=64)  # so that blocks make the peak
    composed, rehearsed = both(small, replace(how, matmul=matmul), "cpu")
    assert composed == rehearsed
    assert composed > both(small, how, "cpu")[0]


def test_a_table_counts_once_whoever_makes_it() -> None:
    """Random numbers look up a table, which their first use in a process makes."""
    how = replace(choice("galore", "fused+subspace", 2, "full"), method="q_galore", weights="int8")
    later = both(model(5), how, "flash")
    random_normal._quantiles.cache_clear()
    first = both(model(5), how, "flash")  # composed before rehearsed
    assert first[0] == first[1] == later[0] == later[1]


def test_the_table_of_a_drawn_basis_is_counted() -> None:
    how = choice("apollo", "unfused", 1, "full")
    job = Job(Config(), find_card("24GB", "cuda"), model(2), how.micro_batch, SEQ_LEN, "flash")
    whole = rehearse(model(2), job.optimizer(kind_of(how)), how, SEQ_LEN, attention="flash")
    assert whole.persistent["projections"] == random_normal.lookup_table("cpu").nbytes


@pytest.mark.parametrize(
    ("method", "mode", "sums", "attention"),
    [
        ("galore", "unfused", "int8", "flash"),
        ("galore", "fused+subspace", "host", "flash"),
        ("adamw", "unfused", "host", "cpu"),
        ("apollo", "fused+subspace", "bf16", "cpu"),
        ("frugal", "unfused", "bf16", "flash"),
    ],
)
def test_composed_is_rehearsed_with_other_sums(
    method: str, mode: str, sums: Any, attention: str
) -> None:
    how = replace(choice(method, mode, 3, "full"), sums=sums)
    composed, rehearsed = both(model(4), how, attention)
    assert composed == rehearsed


@pytest.mark.parametrize("blocks", [1, 2, 6])
@pytest.mark.parametrize(("mode", "accumulate"), MODES)
def test_composed_is_rehearsed_with_block_inputs_in_host_memory(
    mode: str, accumulate: int, blocks: int
) -> None:
    for level in ["keep", "attn", "full", "keep:2,attn:2,full"][: 3 + (blocks > 2)]:
        how = replace(choice("galore", mode, accumulate, level), boundaries="host")
        composed, rehearsed = both(model(blocks), how, "flash")
        assert composed == rehearsed, level


@pytest.mark.parametrize("sums", ["fp32", "host"])
def test_host_memory_is_composed_to_the_byte(sums: Any) -> None:
    how = replace(choice("galore", "unfused", 3, "full"), boundaries="host", sums=sums)
    job = Job(Config(), find_card("24GB", "cuda"), model(7), 6, SEQ_LEN, "flash")
    assert job.host(how) == job.memory(how).host > 0


@pytest.mark.parametrize("attention", ["flash"])
@pytest.mark.parametrize(
    ("method", "blocks", "micro_batches", "boundaries", "place", "home"),
    [
        ("adamw", 1, 1, "keep", "device", "device"),
        ("galore", 2, 3, "host", "device", "device"),
        ("apollo", 3, 2, "keep", "host", "host"),
        ("frugal", 6, 3, "host", "host", "host"),
        ("adamw", 7, 40, "keep", "host", "device"),
    ],
)
def test_composed_is_rehearsed_in_layer_major_order(
    method: str,
    blocks: int,
    micro_batches: int,
    boundaries: Any,
    place: Any,
    home: Any,
    attention: str,
) -> None:
    how = choice(method, "layer-major", micro_batches, "full")
    how = replace(how, boundaries=boundaries, place=place, blocks=home)
    composed, rehearsed = both(model(blocks), how, attention)
    assert composed == rehearsed


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize(("mode", "accumulate"), MODES)
def test_composed_is_rehearsed_where_rows_are_surveyed(
    mode: str, accumulate: int, weights: Any
) -> None:
    how = replace(choice("adamw", mode, accumulate, "full"), method="scale", weights=weights)
    if weights == "int8":
        how = replace(how, ends="int8")
    composed, rehearsed = both(model(5, vocab_size=9001), how, "flash")
    assert composed == rehearsed


@pytest.mark.parametrize("rest", ["adam8bit", "apollo_mini"])
@pytest.mark.parametrize(("mode", "accumulate"), MODES)
def test_composed_is_rehearsed_with_ends_in_codes(mode: str, accumulate: int, rest: str) -> None:
    how = replace(choice("galore", mode, accumulate, "full"), weights="int8", ends="int8")
    composed, rehearsed = both(model(5), how, "flash", rest)
    assert composed == rehearsed


def random_case(seed: int) -> tuple[ModelConfig, Choice, str]:
    """(model, choice, attention), anything that fits together."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4, 6])
    key_value = draw.choice([each for each in (1, 2, heads) if heads % each == 0])
    sizes = ModelConfig(
        hidden_size=heads * 8 * draw.randint(1, 6),
        intermediate_size=draw.randint(8, 400),
        num_hidden_layers=draw.randint(1, 7),
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        head_dim=8 * draw.randint(1, 6),
        vocab_size=draw.choice([100, 4096, 5000, 9001]),
        tie_word_embeddings=draw.random() < 0.2,
        attention_bias=draw.random() < 0.2,
        mlp_bias=draw.random() < 0.2,
    )
    method = draw.choice([*METHODS, "fira", "apollo_mini", "natural_galore", "q_galore", "lion"])
    ranked = method in ("galore", "apollo", "cosmos", "fira", "natural_galore", "q_galore")
    rank = draw.randint(1, 48) if ranked else {"apollo_mini": 1}.get(method)
    mode, micro_batches = draw.choice(MODES)
    layer_major = draw.random() < 0.25
    boundaries: Any = draw.choice(["keep", "host"])
    place: Any = draw.choice(["device", "host"])
    level = draw.choice(["keep", "attn", "full", "keep:1,full"])
    attention = draw.choice(["cpu", "flash"])
    how = Choice(
        method,
        rank,
        draw.choice(["fp32", "bf16", "8bit"]),
        draw.choice(["bf16", "int8", "fp32"] if attention == "cpu" else ["bf16", "int8"]),
        mode,  # type: ignore[arg-type]
        "full" if sizes.num_hidden_layers == 1 else level,
        draw.randint(1, 4),
        micro_batches,
        draw.choice([None, 1.0]) if mode != "fused" else None,
        draw.choice(["recompute", "keep"]),
        sums=draw.choice(["fp32", "bf16", "int8", "host"]),
        boundaries=boundaries,
    )
    if layer_major:
        how = replace(how, update="layer-major", recompute="full", clip=None)
        how = replace(how, accumulate=draw.randint(1, 7), place=place)
        how = replace(how, blocks=place if draw.random() < 0.5 else "device")
    return sizes, how, attention


def check_random(seed: int) -> None:
    config, how, attention = random_case(seed)
    composed, rehearsed = both(config, how, attention)
    assert composed == rehearsed, (config, how, attention)


@pytest.mark.parametrize("tenth", range(6))
def test_composed_is_rehearsed_for_anything(tenth: int) -> None:
    for seed in range(10 * tenth, 10 * tenth + 10):
        check_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("tenth", range(6, 56))
def test_composed_is_rehearsed_for_anything_more(tenth: int) -> None:
    for seed in range(10 * tenth, 10 * tenth + 10):
        check_random(seed)


PRESETS: list[tuple[str, str, Any, str, Any, str]] = [
    ("llama-60m", "galore", 128, "bf16", "fused+subspace", "keep"),
    ("llama-130m", "fira", 192, "int8", "unfused", "attn"),
    ("llama-1b", "cosmos", 64, "bf16", "fused", "full"),
    ("llama-7b", "galore", 1024, "bf16", "fused+subspace", "full"),
    ("llama-7b", "apollo_mini", 1, "int8", "fused", "keep:4,full"),
    ("llama-13b", "apollo", 1280, "int8", "fused", "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "rank", "weights", "mode", "recompute"), PRESETS)
def test_composed_is_rehearsed_at_real_sizes(
    name: str, method: str, rank: int, weights: Any, mode: Any, recompute: str
) -> None:
    micro_batches = 1 if mode == "fused" else 2
    states = "bf16" if method == "cosmos" else "8bit"
    how = Choice(method, rank, states, weights, mode, recompute, 2, micro_batches, None)
    composed, rehearsed = both(read_preset(name), how, "flash")
    assert composed == rehearsed
