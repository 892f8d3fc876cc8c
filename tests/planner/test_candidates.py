"""What may be varied: published order, and nothing that the user has fixed."""

import itertools
from typing import Any

import pytest

from lowmem.config.presets import read_preset
from lowmem.config.schema import Config
from lowmem.errors import ConfigError
from lowmem.optim.methods import METHODS
from lowmem.planner.candidates import Kind, check_fused, clip_of, kinds, levels, modes

MODEL = read_preset("llama-9m")  # hidden size 128
GALORE, ADAMW = Kind("galore", 8, "fp32"), Kind("adamw", None, "fp32")


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def found(hidden_size: int = 128, **optimizer: Any) -> list[tuple[str, Any, str]]:
    model = MODEL.model_copy(update={"hidden_size": hidden_size})
    return [(k.method, k.rank, k.states) for k in kinds(config(optimizer=optimizer), model)]


def test_the_order_is_that_of_published_quality() -> None:
    """Full rank first, then GaLore from a quarter of the hidden size down, moments exact first."""
    assert found() == [
        ("adamw", None, "fp32"),
        ("adam8bit", None, "8bit"),
        *(("galore", rank, states) for rank in (32, 16, 8, 4) for states in ("fp32", "8bit")),
    ]


def test_small_models_have_fewer_ranks_and_no_rank_below_four() -> None:
    assert [rank for _, rank, _ in found(hidden_size=64, method="galore", states="fp32")] == [
        *(16, 8, 4),
    ]
    assert [rank for _, rank, _ in found(hidden_size=8, method="galore", states="fp32")] == [4]


@pytest.mark.parametrize(
    ("method", "rank", "states"),
    list(itertools.product(["auto", *METHODS], ["auto", 7, 0.3], ["auto", "fp32", "bf16", "8bit"])),
)
def test_every_kind_is_what_the_user_asked_for(method: str, rank: Any, states: str) -> None:
    """Or the contradiction is told: a dense method has no rank, adam8bit no other format."""
    contradiction = (rank != "auto" and method in ("adamw", "adam8bit")) or (
        method == "adam8bit" and states in ("fp32", "bf16")
    )
    if contradiction:
        with pytest.raises(ConfigError, match=r"optimizer\.(rank|states) = .* does not suit"):
            found(method=method, rank=rank, states=states)
        return
    kinds_found = found(method=method, rank=rank, states=states)
    assert kinds_found
    assert len(kinds_found) == len(set(kinds_found))
    for kind in kinds_found:
        assert method in ("auto", kind[0])
        assert rank in ("auto", kind[1])
        assert states in ("auto", kind[2])
        assert (kind[1] is None) == (kind[0] != "galore")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"method": "galore", "gapp": 3}, "optimizer.gapp is unknown to method 'galore'"),
        ({"method": "galore", "gap": 0}, "optimizer.gap = 0 does not suit"),
        ({"method": "galor"}, "optimizer.method = 'galor' is unknown"),
    ],
)
def test_wrong_options_are_told_before_anything_is_tried(
    optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        found(**optimizer)


def test_a_kind_changes_only_what_it_decides() -> None:
    asked = config(optimizer={"weight_decay": 0.1, "gap": 5, "lr": 0.3}).optimizer
    settings = Kind("galore", 16, "8bit").optimizer(asked)
    assert (settings.method, settings.rank, settings.states) == ("galore", 16, "8bit")
    assert (settings.weight_decay, settings.lr, settings.options) == (0.1, 0.3, {"gap": 5})
    assert Kind("adamw", None, "bf16").optimizer(asked).rank == "auto"


@pytest.mark.parametrize(
    ("train", "kind", "expected"),
    [
        ({}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({}, ADAMW, ["unfused", "fused"]),  # without a projection the sum is a whole gradient
        ({"clip": "off"}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({"clip": 0.5}, GALORE, ["unfused", "fused+subspace"]),
        ({"clip": 1}, ADAMW, ["unfused"]),
        ({"micro_batch": 8}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({"micro_batch": 4}, GALORE, ["unfused", "fused+subspace"]),
        ({"update": "unfused"}, GALORE, ["unfused"]),
        ({"update": "fused+subspace", "clip": 0.5}, GALORE, ["fused+subspace"]),
        ({"update": "fused", "clip": "off"}, GALORE, ["fused"]),
    ],
)
def test_modes_that_do_what_was_asked(
    train: dict[str, Any], kind: Kind, expected: list[str]
) -> None:
    assert modes(config(train=train), kind, rows=8) == expected


@pytest.mark.parametrize("train", [{}, {"clip": "off"}, {"micro_batch": 8}, {"micro_batch": 9}])
def test_fused_suits_one_micro_batch_without_clipping(train: dict[str, Any]) -> None:
    check_fused(config(train=train), rows=8)


@pytest.mark.parametrize(
    ("train", "message", "fix"),
    [
        ({"clip": 0.5}, 'train.clip = 0.5 with train.update = "fused"', "--clip off"),
        ({"micro_batch": 7}, "cannot accumulate 8 sequences, 7 at a time", "--batch 7seq"),
    ],
)
def test_what_fused_cannot_do_is_told(train: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        modes(config(train={"update": "fused", **train}), GALORE, rows=8)
    assert fix in caught.value.fix
    assert "--update fused+subspace" in caught.value.fix


def test_levels_fastest_first_or_as_asked() -> None:
    assert levels(config()) == ["keep", "attn", "full"]
    assert levels(config(train={"recompute": "attn"})) == ["attn"]


@pytest.mark.parametrize(
    ("clip", "mode", "limit"),
    [
        ("auto", "unfused", 1.0),
        ("auto", "fused+subspace", 1.0),
        ("auto", "fused", None),
        ("off", "unfused", None),
        (0.25, "unfused", 0.25),
        (2, "fused+subspace", 2.0),
    ],
)
def test_the_norm_is_limited_where_it_is_known_in_time(
    clip: Any, mode: Any, limit: float | None
) -> None:
    assert clip_of(config(train={"clip": clip}), mode) == limit
