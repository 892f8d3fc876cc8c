"""Which trials a sweep has, and which requests are refused."""

from pathlib import Path
from typing import Any

import pytest

from lowmem.analysis.sweep import MOST, Request, read_request, requested, seeds_of, trials
from lowmem.errors import ConfigError

LR, RANK, METHOD = "optimizer.lr", "optimizer.rank", "optimizer.method"


def takes_rank(method: str) -> bool:
    return method == "galore"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rates.toml"
    path.write_text(text)
    return path


def test_a_grid_is_a_cross_product_with_every_seed() -> None:
    grid: dict[str, list[Any]] = {METHOD: ["galore"], RANK: [8, 16], LR: [0.1, 0.2, 0.3]}
    found = trials(Request([0, 5], {}, [grid]), takes_rank)
    assert len(found) == 2 * 3 * 2
    assert len({trial.name for trial in found}) == len(found)
    assert found[0].name == "galore-rank8-lr0.1-seed0"
    assert found[1].varied == {METHOD: "galore", RANK: 8, LR: 0.1, "train.seed": 5}


def test_a_method_without_rank_is_tried_once() -> None:
    grid: dict[str, list[Any]] = {METHOD: ["adamw", "galore"], RANK: ["8", "16"]}
    names = [trial.name for trial in trials(Request([0], {}, [grid]), takes_rank)]
    assert names == ["adamw-seed0", "galore-rank8-seed0", "galore-rank16-seed0"]
    fixed = Request([0], {METHOD: "adamw"}, [{RANK: [8, 16]}])
    assert [trial.varied for trial in trials(fixed, takes_rank)] == [{"train.seed": 0}]


def test_grids_are_added_and_what_is_in_two_of_them_is_tried_once() -> None:
    grids: list[dict[str, list[Any]]] = [
        {METHOD: ["adamw"], LR: [1, 2]},
        {METHOD: ["adamw"], LR: [2, 3]},
    ]
    names = [trial.name for trial in trials(Request([0], {}, grids), takes_rank)]
    assert names == ["adamw-lr1-seed0", "adamw-lr2-seed0", "adamw-lr3-seed0"]


def test_two_trials_of_one_name_are_refused() -> None:
    grid: dict[str, list[Any]] = {"data.source": ["a b", "a/b"]}
    with pytest.raises(ConfigError, match="two trials would be called sourcea_b-seed0"):
        trials(Request([0], {}, [grid]), takes_rank)


def test_a_trial_keeps_its_name_when_its_grid_grows() -> None:
    few, more = (
        [trial.name for trial in trials(Request([0], {}, [{LR: lrs}]), takes_rank)]
        for lrs in ([0.1], [0.1, 0.2])
    )
    assert few == more[:1]


def test_a_file_says_the_same_as_flags(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        seeds = 2
        [settings]
        model = "llama-60m"
        train.updates = 10
        [[grid]]
        method = ["adamw", "galore"]
        lr = [0.1, 0.2]
        rank = 8
        """,
    )
    flags = {"model": "llama-60m", "train.updates": 10}
    lists = {METHOD: "adamw, galore", LR: "0.1,0.2", RANK: "8"}
    by_flags = trials(requested(flags | lists, "2"), takes_rank)
    by_file = trials(read_request(path), takes_rank)
    assert sorted(t.name for t in by_file) == sorted(t.name for t in by_flags)
    assert read_request(path).settings == flags


def test_any_setting_can_stand_in_a_grid(tmp_path: Path) -> None:
    text = '[[grid]]\n"optimizer.betas" = [[0.9, 0.95], [0.9, 0.99]]\nweight_decay = [0, 0.1]\n'
    (grid,) = read_request(written(tmp_path, text)).grids
    assert grid["optimizer.weight_decay"] == [0, 0.1]
    assert grid["optimizer.betas"] == [[0.9, 0.95], [0.9, 0.99]]


def test_without_a_grid_only_the_seeds_differ(tmp_path: Path) -> None:
    found = trials(read_request(written(tmp_path, "seeds = [3, 1]")), takes_rank)
    assert [trial.name for trial in found] == ["seed3", "seed1"]


@pytest.mark.parametrize(
    ("told", "seeds"),
    [("3", [0, 1, 2]), (2, [0, 1]), ("4,2", [4, 2]), ([7], [7]), ("0,1", [0, 1])],
)
def test_seeds_are_a_number_or_a_list(told: Any, seeds: list[int]) -> None:
    assert seeds_of(told, "seeds") == seeds


@pytest.mark.parametrize("told", ["0", "-1", "x", "1,1", "1,", 0, 1.5, True, [], [-1], None, [[1]]])
def test_other_seeds_are_refused(told: Any) -> None:
    with pytest.raises(ConfigError, match="no number of seeds"):
        seeds_of(told, "--seeds")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed = 3", "seed"),
        ("settings = 3", "settings"),
        ("grid = 3", "grid"),
        ("[grid]\nlr = 1", "grid"),
        ("[[grid]]\nlr = []", "lr"),
        ("[[grid", "TOML"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_request(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_request(tmp_path / "nothing.toml")


@pytest.mark.parametrize("key", [LR, "train.seed"])
def test_what_is_given_for_all_cannot_be_varied(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        trials(Request([0], {LR: 0.1}, [{key: [1, 2]}]), takes_rank)


def test_an_empty_place_in_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty place"):
        requested({LR: "0.1,,0.2"}, None)


def test_a_sweep_that_would_never_end_is_refused_at_once() -> None:
    grid = {name: list(range(MOST)) for name in (LR, "train.updates", "optimizer.gap")}
    with pytest.raises(ConfigError, match="more than 1,000 trials"):
        trials(Request([0], {}, [grid]), takes_rank)
