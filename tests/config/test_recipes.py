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
from lowmem.train.schedule import learning_rate

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


SHEETS: dict[str, dict[str, tuple[float, ...]]] = {
    # method: what the numbers are, then size: the numbers, of the papers' tables and scripts
    "galore": {  # lr, rank, gap, scale
        **{"60m": (0.01, 128, 200, 0.25), "130m": (0.01, 256, 200, 0.25)},
        **{"350m": (0.01, 256, 200, 0.25), "1b": (0.01, 512, 200, 0.25)},
        **{"1b-script": (0.01, 1024, 200, 0.25), "7b": (0.005, 1024, 500, 0.25)},
    },
    "natural-galore": {  # lr, rank, gap, scale
        **{"60m": (0.01, 128, 200, 0.25), "130m": (0.01, 256, 200, 0.25)},
        **{"350m": (0.01, 256, 200, 0.25), "1b": (0.01, 512, 200, 0.25)},
        **{"60m-paper": (0.01, 128, 200, 0.25), "130m-paper": (0.01, 256, 200, 0.25)},
        **{"350m-paper": (0.01, 256, 200, 0.25), "1b-paper": (0.01, 512, 200, 0.25)},
        "1b-script": (0.01, 1024, 200, 0.25),
    },
    "q-galore": {  # lr, rank, gap, scale
        **{"60m": (0.015, 128, 200, 0.25), "130m": (0.015, 256, 200, 0.25)},
        **{"350m": (0.01, 256, 200, 0.25), "1b": (0.01, 512, 200, 0.25)},
        **{"1b-script": (0.01, 1024, 200, 0.25), "7b": (0.004, 1024, 500, 0.25)},
    },
    "fira": {  # lr, rank, gap, alpha
        **{"60m": (0.01, 128, 200, 0.25), "130m": (0.01, 256, 200, 0.25)},
        **{"350m": (0.01, 256, 200, 0.25), "1b": (0.01, 512, 200, 0.0625)},
        **{"7b": (0.005, 64, 500, 0.0625), "7b-script": (0.005, 64, 500, 0.0625)},
    },
    "apollo": {  # lr, rank, gap, scale = alpha squared
        **{"60m": (0.01, 128, 200, 1.0), "130m": (0.01, 192, 200, 1.0)},
        **{"350m": (0.01, 256, 200, 1.0), "1b": (0.01, 512, 200, 0.25)},
        **{"1b-script": (0.01, 256, 200, 1.0), "7b": (0.01, 256, 200, 1.0)},
        **{"60m-svd": (0.01, 128, 200, 1.0), "130m-svd": (0.01, 192, 200, 1.0)},
        **{"350m-svd": (0.01, 256, 200, 1.0), "1b-svd": (0.01, 512, 200, 0.16)},
        "350m-1024": (0.01, 256, 200, 2.0),
    },
    "apollo-mini": {  # lr, rank, gap, scale
        **{"60m": (0.01, 1, 200, 128.0), "130m": (0.01, 1, 200, 192.0)},
        **{"350m": (0.01, 1, 200, 128.0), "1b": (0.01, 1, 200, 128.0)},
        **{"60m-tuned": (0.02, 1, 200, 128.0), "130m-tuned": (0.02, 1, 200, 192.0)},
        **{"350m-tuned": (0.02, 1, 200, 128.0), "1b-tuned": (0.02, 1, 200, 128.0)},
        **{"7b": (0.01, 1, 200, 128.0), "350m-1024": (0.01, 1, 200, 384.0)},
    },
    "q-apollo": {  # lr, rank, gap, scale
        **{"60m": (0.01, 128, 200, 1.0), "130m": (0.01, 192, 200, 1.0)},
        "350m": (0.01, 256, 200, 1.0),
    },
    "q-apollo-mini": {  # lr, rank, gap, scale
        **{"60m": (0.01, 1, 200, 128.0), "130m": (0.01, 1, 200, 192.0)},
        **{"350m": (0.01, 1, 200, 128.0), "7b-script": (0.01, 1, 200, 128.0)},
    },
    "frugal": {  # lr, density, gap, scale
        **dict.fromkeys((*SIZES, "350m-script", "1b-script"), (0.001, 0.25, 200, 1.0)),
        **{f"{size}-c4": (0.001, 0.25, 200, 1.0) for size in SIZES},
        **{f"{size}-density0": (0.001, 0.0, 200, 1.0) for size in SIZES},
        "7b-script": (0.0005, 0.0, 500, 0.3),
    },
    "cosmos": {  # lr, rank, ratio, gamma
        **dict.fromkeys(("130m", "350m", "1b"), (0.0005, 64, 0.25, 0.25)),
        **{f"{size}-script": (0.002, 64, 0.2, 0.2) for size in ("130m", "350m", "1b")},
    },
    "adamw": {  # lr
        **{"60m": (0.001,), "130m": (0.001,), "350m": (0.001,), "1b": (0.0005,)},
        **{"7b": (0.0003,), "350m-1024": (0.005,)},
    },
    "adam8bit": {  # lr
        **{"60m": (0.001,), "130m": (0.001,), "350m": (0.001,), "1b": (0.0005,)},
        "7b": (0.0003,),
    },
}
KEYS = {
    "fira": ("rank", "gap", "alpha"),
    "frugal": ("density", "gap", "scale"),
    "cosmos": ("rank", "ratio", "gamma"),
    **{"adamw": (), "adam8bit": ()},
}
BETAS = {"q-galore": [0.9, 0.95], "cosmos": [0.9, 0.95]}
EPS = dict.fromkeys(("galore", "natural-galore", "fira", "apollo", "apollo-mini"), 1e-6)
DECAYS = {"natural-galore-60m": 0.01} | {f"cosmos-{size}-script": 0.1 for size in SIZES}
UPDATES = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}
# Documents whose mean loss counts once: micro-batch and cards of the released scripts.
EVALUATED = {"60m": (256, 1), "130m": (256, 1), "350m": (128, 4), "1b": (16, 8), "7b": (8, 64)}
EVALUATED_BY = {
    "apollo": {"130m": (128, 4), "1b": (64, 8), "7b": (16, 8)},
    "fira": {"350m": (64, 8), "1b": (64, 8), "7b": (8, 8)},
}


def sheet_of(name: str) -> tuple[str, str]:
    """Method and section of a recipe; the longest method first, for apollo-mini-60m."""
    for method in sorted(SHEETS, key=len, reverse=True):
        if name.startswith(f"{method}-"):
            return method, name.removeprefix(f"{method}-")
    raise AssertionError(f"no sheet for {name}")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_the_papers_and_their_scripts_say(name: str) -> None:
    method, section = sheet_of(name)
    config = load({"recipe": name}, environ={}).config
    optimizer, options = config.optimizer, config.optimizer.options
    keys = KEYS.get(method, ("rank", "gap", "scale"))
    found = [optimizer.rank if key == "rank" else options[key] for key in keys]
    assert (optimizer.lr, *found) == SHEETS[method][section]
    newer = method == "cosmos" and section.endswith("-script")
    assert options["betas"] == ([0.95, 0.95] if newer else BETAS.get(method, [0.9, 0.999]))
    assert options["eps"] == (1e-8 if name == "galore-7b" else EPS.get(method, 1e-8))
    assert optimizer.weight_decay == DECAYS.get(name, 0.0)


def test_there_is_no_recipe_more_in_the_sheets() -> None:
    assert sorted(NAMES) == sorted(f"{m}-{section}" for m in SHEETS for section in SHEETS[m])


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes() if recipe.protocol == "c4"])
def test_a_recipe_of_the_c4_benchmark_runs_and_is_evaluated_as_there(name: str) -> None:
    method, section = sheet_of(name)
    size = section.partition("-")[0]
    config = load({"recipe": name}, environ={}).config
    updates = 10_000 if name == "fira-7b-script" else UPDATES[size]
    assert config.train.updates == updates
    for update, share in [(0, 0.0), (updates // 20, 0.5), (updates // 10, 1.0), (updates, 0.1)]:
        rate = learning_rate(config.schedule, 1.0, update, updates)
        assert rate == pytest.approx(share)
    middle = (updates // 10 + updates) // 2  # half a cosine from 1 to 0.1
    assert learning_rate(config.schedule, 1.0, middle, updates) == pytest.approx(0.55)
    unclipped = size != "7b" or method in ("apollo", "apollo-mini", "q-apollo-mini")
    assert config.train.clip == ("off" if unclipped else 1.0)
    if name != "q-apollo-mini-7b-script":  # one sequence per update
        assert config.train.batch == "512seq"
        by = "apollo" if "apollo" in method else method
        evaluated = EVALUATED_BY.get(by, {}).get(size, EVALUATED[size])
        assert (config.evaluate.batch, config.evaluate.gpus) == evaluated


@pytest.mark.parametrize(
    ("name", "told", "never"),
    [
        ("galore-60m", ("moments are float32", "bf16 weights", "signs of the old"), ("autocast",)),
        ("galore-7b", ("bf16 weights", "signs of the old"), ("moments are float32",)),
        ("q-galore-60m", ("256 in the released", "embedding, head"), ("moments are float32",)),
        ("apollo-60m", ("moments are float32", "bf16 weights"), ("signs of the old",)),
        ("apollo-60m-svd", ("moments are float32", "signs of the old"), ()),
        ("frugal-60m-c4", ("moments are float32", "computed in float32"), ("bf16 weights",)),
        ("frugal-7b-script", ("averages the means",), ("computed in float32",)),
    ],
)
def test_what_differs_is_told_of_recipes_with_the_setting_alone(
    name: str, told: tuple[str, ...], never: tuple[str, ...]
) -> None:
    differs = "\n".join(find_recipe(name).differs)
    assert all(part in differs for part in told)
    assert not any(part in differs for part in never)


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
