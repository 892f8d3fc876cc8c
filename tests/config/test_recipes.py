"""Recipes: that each is a configuration, and what overrides what."""

from pathlib import Path

import pytest

from lowmem.config.load import load
from lowmem.config.recipes import Recipe, find_recipe, recipes
from lowmem.config.schema import OptimizerConfig
from lowmem.errors import ConfigError
from lowmem.optim.assign import method_options
from lowmem.optim.methods import build_method
from lowmem.planner.quality import evidence, published_row

NAMES = [recipe.name for recipe in recipes()]
SIZES = ("60m", "130m", "350m", "1b")
NOT_PUBLISHED = {  # of (method, size): no setting and no result
    ("cosmos", "60m"),
    ("q_apollo", "1b"),
    ("q_apollo_mini", "1b"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_configuration(name: str) -> None:
    loaded = load({"recipe": name}, environ={})
    optimizer = loaded.config.optimizer
    build_method(optimizer.method, method_options(optimizer))
    assert loaded.origins["optimizer.method"] == f"recipe {name}"
    assert optimizer.lr != "auto"
    assert optimizer.weight_decay != "auto"
    train = loaded.config.train
    assert train.updates != "auto" or train.tokens is not None
    assert loaded.config.model == f"llama-{find_recipe(name).size}"


def test_there_is_a_recipe_for_every_method_and_size() -> None:
    methods = {recipe.method for recipe in recipes()}
    assert methods >= {
        *("adamw", "adam8bit", "galore", "natural_galore", "q_galore", "apollo", "apollo_mini"),
        *("q_apollo", "frugal", "fira", "cosmos"),
    }
    wanted = {(method, size) for method in methods for size in SIZES} - NOT_PUBLISHED
    assert wanted <= {(recipe.method, recipe.size) for recipe in recipes()}
    assert len(set(NAMES)) == len(NAMES)


def test_settings_of_the_sheet_reach_the_recipe() -> None:
    """A few by hand, from GaLore's section 5, Fira's scripts and Natural GaLore's of 60M."""
    galore, fira, natural = (
        load({"recipe": name}, environ={}).config
        for name in ("galore-350m", "fira-1b", "natural-galore-60m")
    )
    assert (galore.train.updates, galore.train.batch, galore.data.seq_len) == (
        60_000,
        "512seq",
        256,
    )
    assert galore.optimizer.rank == 256
    assert galore.optimizer.options["scale"] == 0.25
    assert (galore.schedule.warmup, galore.schedule.start) == (0.1, "zero")
    assert (galore.evaluate.tokens, galore.evaluate.batch) == (10_000_000, 128)
    assert galore.data.protocol == "galore"
    assert fira.optimizer.options["alpha"] == 0.0625
    assert natural.optimizer.weight_decay == 0.01
    cycles = [load({"recipe": f"frugal-{s}"}, environ={}).config.schedule.cycle for s in SIZES]
    assert cycles == [10_000, 20_000, 60_000, 100_000]


def _with_row() -> list[Recipe]:
    return [recipe for recipe in recipes() if recipe.published is not None]


def test_a_published_table_exists_and_is_met_by_most_recipes() -> None:
    tables = {row.source for row in evidence()}
    assert {recipe.published for recipe in _with_row()} <= tables
    found = published_row("arXiv:2412.05270, Table 2", "apollo", "1b", None, 256 / 2048)
    assert found is not None
    assert found.ppl == 14.25
    assert published_row("arXiv:2403.03507, Table 2", "galore", "1b", None, 0.5) is None


def test_flags_win_over_files_over_recipes_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('recipe = "galore-60m"\n[optimizer]\nrank = 64\ngap = 100\n')
    loaded = load({"optimizer.rank": "32"}, [path], environ={"LOWMEM_GAP": "50"})
    assert loaded.config.optimizer.rank == 32
    assert loaded.config.optimizer.options["gap"] == 50
    assert loaded.config.optimizer.lr == 0.01
    assert loaded.config.guard.window == 128
    assert loaded.origins["optimizer.options.scale"] == "recipe galore-60m"
    stronger = load({"recipe": "fira_60m"}, [path], environ={})
    assert stronger.config.optimizer.method == "fira"
    assert stronger.config.optimizer.rank == 64


def test_a_budget_in_another_form_displaces_that_of_the_recipe() -> None:
    config = load({"recipe": "galore-60m", "train.tokens": "1M"}, environ={}).config
    assert (config.train.tokens, config.train.updates) == (10**6, "auto")


@pytest.mark.parametrize(
    ("name", "hint"), [("galore-61m", "galore-60m"), ("nonsense", "lowmem reproduce list")]
)
def test_an_unknown_recipe_is_named_with_its_neighbour(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="1 problem") as caught:
        load({"recipe": name}, environ={})
    assert "--recipe" in caught.value.why
    assert f"'{name}'" in caught.value.why
    assert hint in caught.value.why
    with pytest.raises(ConfigError):
        load({}, environ={}, assignments=["recipe=3"])


def test_weight_decay_is_the_sheets_unless_somebody_says_otherwise() -> None:
    from lowmem.optim.assign import weight_decay

    by_sheet = OptimizerConfig(method="natural_galore")
    assert weight_decay(by_sheet, 58_073_600) == 0.01
    assert weight_decay(by_sheet, 134_105_856) == 0.0
    given = OptimizerConfig(method="natural_galore", weight_decay=0.0)
    assert weight_decay(given, 58_073_600) == 0.0
