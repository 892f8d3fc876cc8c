"""Update modes and places: what may be chosen, and contradictions told."""

import re
from typing import Any

import pytest

from lowmem.config.schema import Config
from lowmem.errors import ConfigError
from lowmem.planner.candidates import Kind
from lowmem.planner.ways import check_fused, clip_of, modes, ways

GALORE, ADAMW = Kind("galore", 8, "fp32"), Kind("adamw", None, "fp32")


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("optimizer", "train", "message"),
    [
        ({"method": "sophia"}, {"update": "fused"}, "\"fused\" with method 'sophia'"),
        ({"method": "adahessian"}, {"update": "fused+subspace"}, "with method 'adahessian'"),
        ({"rest": {"method": "sophia"}}, {"update": "fused+subspace"}, "with method 'sophia'"),
        ({"method": "adahessian"}, {"weights": "bf16"}, 'train.weights = "bf16" with method'),
    ],
)
def test_curvature_is_refused_where_it_cannot_be_estimated(
    optimizer: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    own = optimizer | {"method": optimizer.get("method", "galore")}
    kind = Kind(own["method"], 8 if own["method"] == "galore" else None, "fp32")
    with pytest.raises(ConfigError, match=re.escape(message)):
        modes(config(optimizer=own, train=train), kind, 8)


@pytest.mark.parametrize("rest", ["auto", "sophia"])
def test_curvature_leaves_one_mode(rest: str) -> None:
    name = "sophia" if rest == "auto" else "galore"
    own = config(optimizer={"method": name, "rest": {"method": rest}}, train={"clip": "off"})
    kind = Kind(name, None if rest == "auto" else 8, "fp32")
    assert modes(own, kind, 1) == ["unfused"]


@pytest.mark.parametrize(
    ("train", "kind", "expected"),
    [
        ({}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({}, ADAMW, ["unfused", "fused"]),  # without a projection the sum is a whole gradient
        ({}, Kind("fira", 8, "fp32"), ["unfused", "fused"]),  # needs the whole gradient too
        ({"clip": "off"}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({"clip": 0.5}, GALORE, ["unfused", "fused+subspace"]),
        ({"clip": 1}, ADAMW, ["unfused"]),
        ({"micro_batch": 8}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({"micro_batch": 4}, GALORE, ["unfused", "fused+subspace"]),
        ({"update": "unfused"}, GALORE, ["unfused"]),
        ({"update": "layer-major"}, GALORE, ["layer-major"]),
        ({"boundaries": "host"}, GALORE, ["unfused", "fused+subspace", "fused"]),
        ({"blocks": "host"}, GALORE, ["layer-major"]),
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


@pytest.mark.parametrize(
    ("clip", "mode", "limit"),
    [
        ("auto", "unfused", 1.0),
        ("auto", "fused+subspace", 1.0),
        ("auto", "fused", None),
        ("auto", "layer-major", None),
        ("off", "unfused", None),
        (0.25, "unfused", 0.25),
        (2, "fused+subspace", 2.0),
    ],
)
def test_the_norm_is_limited_where_it_is_known_in_time(
    clip: Any, mode: Any, limit: float | None
) -> None:
    assert clip_of(config(train={"clip": clip}), mode) == limit


def test_host_memory_is_taken_in_layer_major_order_or_where_it_was_asked_for() -> None:
    def found(device: str, place: str = "auto", **train: Any) -> list[tuple[str, str, str]]:
        asked = config(optimizer={"place": place}, train={"device": device, **train})
        return [(way.update, way.boundaries, way.place) for way in ways(asked, ADAMW, rows=8)]

    assert found("cuda") == [("unfused", "keep", "device"), ("fused", "keep", "device")]
    assert found("cuda", place="host") == [("unfused", "keep", "host")]
    assert found("cuda", update="layer-major") == [
        ("layer-major", boundaries, place)
        for boundaries in ("keep", "host")
        for place in ("device", "host", "host")  # the last with the weights of blocks, too
    ]
    assert found("cuda", update="layer-major", boundaries="host", place="device") == [
        ("layer-major", "host", "device")
    ]
    assert found("cpu", update="layer-major") == [("layer-major", "keep", "device")]
    assert found("cuda", boundaries="host") == [
        ("unfused", "host", "device"),
        ("fused", "host", "device"),
    ]


@pytest.mark.parametrize(
    ("sections", "what", "fix"),
    [
        (
            {"train": {"update": "layer-major", "clip": 1.0}},
            "train.clip = 1.0",
            "--update unfused, or --update fused+subspace",
        ),
        (
            {"train": {"update": "layer-major", "recompute": "attn"}},
            'train.recompute = "attn"',
            "--recompute full",
        ),
        (
            {"train": {"update": "unfused", "blocks": "host"}},
            'train.blocks = "host" with train.update = "unfused"',
            "--update layer-major",
        ),
        (
            {"train": {"blocks": "host"}, "optimizer": {"place": "device"}},
            'train.blocks = "host" with optimizer.place = "device"',
            "--place host",
        ),
        (
            {"train": {"update": "fused+subspace"}, "optimizer": {"place": "host"}},
            'optimizer.place = "host" with train.update = "fused+subspace"',
            "--place device",
        ),
        (
            {"train": {"update": "layer-major"}, "optimizer": {"method": "sophia"}},
            "\"layer-major\" with method 'sophia'",
            "--update unfused",
        ),
    ],
)
def test_what_layer_major_order_and_host_memory_cannot_do_is_refused(
    sections: dict[str, Any], what: str, fix: str
) -> None:
    kind = Kind(sections.get("optimizer", {}).get("method", "adamw"), None, "fp32")
    with pytest.raises(ConfigError) as error:
        ways(config(**sections), kind, rows=8)
    assert what in error.value.what
    assert fix in error.value.fix
