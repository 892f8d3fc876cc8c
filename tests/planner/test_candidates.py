"""What may be varied: published order, and nothing that the user has fixed."""

import itertools
import tomllib
from dataclasses import replace
from typing import Any, Literal

import pytest

from lowmem.config.presets import read_preset
from lowmem.config.schema import Config, StateFormat
from lowmem.config.toml import to_toml
from lowmem.errors import ConfigError
from lowmem.optim.assign import takes_rank
from lowmem.optim.method import ByRole
from lowmem.optim.methods import METHODS, MethodSpec
from lowmem.optim.methods.galore import galore
from lowmem.planner.candidates import Kind, families, quality, sheet_settings

MODEL = read_preset("llama-9m")  # hidden size 128


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def found(hidden_size: int = 128, **optimizer: Any) -> list[tuple[str, Any, str]]:
    """(method, largest rank, states) of every family."""
    model = MODEL.model_copy(update={"hidden_size": hidden_size})
    best = [family.best for family in families(config(optimizer=optimizer), model)]
    return [(kind.method, kind.rank, kind.states) for kind in best]


def ranks(hidden_size: int = 128, **optimizer: Any) -> list[Any]:
    model = MODEL.model_copy(update={"hidden_size": hidden_size})
    return list(families(config(optimizer=optimizer), model)[0].ranks)


def test_the_order_is_that_of_published_quality() -> None:
    """Nothing was published of so small a model: AdamW first, others by what is least doubted."""
    assert found()[:3] == [
        ("adamw", None, "fp32"),
        ("adamw", None, "8bit"),
        ("adam8bit", None, "8bit"),
    ]
    galore = [kind for kind in found() if kind[0] == "galore"]
    assert galore == [("galore", 32, "fp32"), ("galore", 32, "8bit")]


@pytest.mark.parametrize(
    ("preset", "methods"),
    [
        ("llama-60m", ["muon", "stable_spam", "adamw"]),  # 28.86, 28.81, 30.05
        ("llama-350m", ["scale", "muon", "apollo", "stable_spam"]),  # 16.32, 16.70, 16.80, 16.82
        ("llama-1b", ["stable_spam", "apollo_mini", "muon"]),  # 13.94, 14.15, 14.18
        ("llama-7b", ["scale", "apollo", "apollo_mini", "adamw", "adam8bit", "galore"]),
    ],
)
def test_the_best_published_come_first(preset: str, methods: list[str]) -> None:
    order = [family.method for family in families(config(), read_preset(preset))]
    assert list(dict.fromkeys(order))[: len(methods)] == methods


def test_a_given_rank_leaves_methods_of_which_ranks_are_published() -> None:
    """APOLLO-Mini of rank 7 would not be the Mini of the tables."""
    for rank in (7, 0.3, {"attention": 8, "mlp": 16}):
        assert {kind[0] for kind in found(rank=rank)} == {"galore", "q_galore", "fira", "apollo"}


@pytest.mark.parametrize("given", [{"gap": 0}, {"rank": 8, "gap": 0}, {"gapp": 3}])
def test_what_suits_no_method_is_told(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.gap"):
        found(**given)


def test_what_suits_some_methods_leaves_those(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(*, rank: Literal[4] = 4, states: StateFormat = "fp32") -> ByRole:
        return METHODS["galore"].build(rank=rank, states=states)

    monkeypatch.setitem(METHODS, "galore", MethodSpec(picky, {"any": {"lr": 0.1}}, ""))
    assert {kind[0] for kind in found(rank=7)} == {"q_galore", "fira", "apollo"}


def test_small_models_have_fewer_ranks_and_no_rank_below_four() -> None:
    assert ranks(hidden_size=64, method="galore") == list(range(4, 17))
    assert ranks(hidden_size=8, method="galore") == [2]


@pytest.mark.parametrize(
    ("method", "rank", "states"),
    list(itertools.product(["auto", *METHODS], ["auto", 7, 0.3], ["auto", "fp32", "bf16", "8bit"])),
)
def test_every_kind_is_what_the_user_asked_for(method: str, rank: Any, states: str) -> None:
    """Or the contradiction is told: a dense method has no rank, adam8bit no other format."""
    named = method != "auto"
    contradiction = named and (
        (rank != "auto" and not takes_rank(method))
        or (states not in ("auto", *METHODS[method].states))
        or (isinstance(rank, int) and isinstance(METHODS[method].arguments["rank"], float))
    )
    if contradiction:
        with pytest.raises(ConfigError, match=r"optimizer\.(rank|states) .*(suit|unknown)"):
            found(method=method, rank=rank, states=states)
        return
    kinds_found = found(method=method, rank=rank, states=states)
    assert kinds_found
    assert len(kinds_found) == len(set(kinds_found))
    for kind in kinds_found:
        assert method in ("auto", kind[0])
        assert rank in ("auto", kind[1])
        assert states in ("auto", kind[2])
        assert (kind[1] is None) == (not takes_rank(kind[0]))


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


SHEET = MethodSpec(
    galore,
    {
        "60m": {"lr": 0.1, "rank": 128, "gap": 7, "betas": (0.5, 0.6), "states": "8bit"},
        "1b": {"lr": 0.2, "rank": 256, "gap": 9},
    },
    "nowhere",
)


@pytest.fixture
def sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method "sheet" whose two recipes differ in everything."""
    monkeypatch.setitem(METHODS, "sheet", SHEET)


@pytest.mark.usefixtures("sheet")
@pytest.mark.parametrize(
    ("model", "ranks"),
    [
        ("llama-60m", list(range(16, 129, 8))),
        ("llama-9m", list(range(4, 33))),  # 128 of 512, at a hidden size of 128
        ("llama-1b", list(range(32, 257, 8))),
        ("llama-7b", list(range(64, 513, 8))),  # 256 of 2048, at 4096
    ],
)
def test_ranks_begin_at_the_sheets_share_of_the_hidden_size(model: str, ranks: list[int]) -> None:
    asked = config(optimizer={"method": "sheet", "states": "fp32"})
    assert list(families(asked, read_preset(model))[0].ranks) == ranks


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (None, list(range(4, 33))),  # a quarter of the hidden size
        (1, [1]),  # never more than the sheet says
        (2, [2]),
        (512, list(range(4, 33))),
    ],
)
def test_one_recipe_for_all_sizes_names_the_largest_rank(
    rank: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"lr": 0.1} if rank is None else {"lr": 0.1, "rank": rank}
    monkeypatch.setitem(METHODS, "sheet", MethodSpec(galore, {"any": recipe}, ""))
    assert ranks(method="sheet") == expected


@pytest.mark.parametrize(
    ("method", "formats"),
    [("adamw", ["fp32", "8bit"]), ("adam8bit", ["8bit"])],
)
def test_formats_are_the_methods_own_and_then_eight_bits(method: str, formats: list[str]) -> None:
    assert [states for _, _, states in found(method=method)] == formats


def test_a_method_without_formats_leaves_the_setting_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plain(*, eps: float = 1e-8) -> ByRole:
        return METHODS["adamw"].build(eps=eps)

    monkeypatch.setitem(METHODS, "plain", MethodSpec(plain, {"any": {"lr": 0.1}}, ""))
    assert found(method="plain") == [("plain", None, "own")]
    (family,) = families(config(optimizer={"method": "plain"}), MODEL)
    assert family.best.optimizer(config().optimizer, MODEL.parameters).states == "auto"
    with pytest.raises(ConfigError, match=r"optimizer\.states is unknown to method 'plain'"):
        found(method="plain", states="8bit")


@pytest.mark.usefixtures("sheet")
@pytest.mark.parametrize(
    ("parameters", "given", "expected"),
    [
        (58e6, {}, {"gap": 7, "betas": [0.5, 0.6]}),  # lists: as a file would say it
        (1e12, {}, {"gap": 9}),
        (58e6, {"gap": 3}, {"betas": [0.5, 0.6]}),
        (58e6, {"gap": 3, "betas": [0, 0]}, {}),
    ],
)
def test_the_sheet_fills_what_the_user_left_open(
    parameters: float, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert sheet_settings("sheet", int(parameters), given) == expected
    asked = config(optimizer=given).optimizer
    filled = Kind("sheet", 4, "fp32").optimizer(asked, int(parameters))
    assert filled.options == given | expected
    assert (filled.rank, filled.states, filled.lr) == (4, "fp32", "auto")


@pytest.mark.parametrize("given", [{"alpha": 2.0}, {"scale": 4.0}])
def test_alpha_and_scale_are_one_setting(given: dict[str, float]) -> None:
    """The sheet's scale must not contradict the alpha that a user gives."""
    assert "scale" in sheet_settings("apollo", MODEL.parameters, {})
    assert not {"alpha", "scale"} & sheet_settings("apollo", MODEL.parameters, given).keys()
    assert families(config(optimizer={"method": "apollo", **given}), MODEL)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_sheet_fills_is_what_is_built(method: str) -> None:
    """For every size: built without complaint, and the same when it is read back from a file."""
    for size in ("llama-tiny", "llama-130m", "llama-1b", "llama-13b"):
        model = read_preset(size)
        for family in families(config(optimizer={"method": method}), model):
            kind = family.best
            filled = kind.optimizer(config().optimizer, model.parameters)
            again = config(optimizer=tomllib.loads(to_toml(Config(optimizer=filled)))["optimizer"])
            assert again.optimizer == filled


def test_a_kind_changes_only_what_it_decides() -> None:
    asked = config(optimizer={"weight_decay": 0.1, "gap": 5, "lr": 0.3}).optimizer
    settings = Kind("galore", 16, "8bit").optimizer(asked, MODEL.parameters)
    assert (settings.method, settings.rank, settings.states) == ("galore", 16, "8bit")
    assert (settings.weight_decay, settings.lr) == (0.1, 0.3)
    assert settings.options == {"gap": 5, "scale": 0.25}
    assert Kind("adamw", None, "bf16").optimizer(asked, MODEL.parameters).rank == "auto"


def test_the_largest_rank_that_fits_may_be_any() -> None:
    assert ranks(method="galore", rank="fit") == list(range(1, 129))
    assert ranks(method="galore", rank="fit-fraction")[:2] == [1 / 128, 2 / 128]
    assert ranks(method="galore", rank="fit-mlp")[-1] == {"attention": 64, "mlp": 128}


@pytest.mark.parametrize(
    ("train", "formats"),
    [
        ({"device": "cuda"}, ["bf16", "int8"]),
        ({"device": "cuda", "weights": "int8"}, ["int8"]),
        ({"device": "cpu"}, ["fp32"]),
    ],
)
def test_weights_are_exact_first_or_as_asked(train: dict[str, Any], formats: list[str]) -> None:
    asked = config(train=train, optimizer={"method": "galore", "states": "8bit"})
    assert [family.weights for family in families(asked, read_preset("llama-7b"))] == formats


def test_ends_are_as_asked_and_doubted_where_nothing_is_published() -> None:
    exact, coded = (
        families(
            config(train={"device": "cuda", "weights": "int8", "ends": ends}),
            read_preset("llama-7b"),
        )
        for ends in ("exact", "int8")
    )
    assert {family.best.ends for family in coded} == {"int8"}
    assert {family.best.ends for family in exact} == {"exact"}
    model = read_preset("llama-7b")
    for family in exact:
        kind = family.best
        assert quality(replace(kind, ends="int8"), model).nats > quality(kind, model).nats


def test_a_vanishing_fraction_is_a_rank_of_one() -> None:
    """Found by fuzzing: its quality was no number."""
    tiny, one = (quality(Kind("galore", rank, "fp32"), MODEL) for rank in (1e-320, 1))
    assert tiny == one
