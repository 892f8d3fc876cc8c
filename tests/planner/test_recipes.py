"""Every recipe plans: what it says is kept, and the planner says what card it needs."""

import pytest

from lowmem.config.defaults import settle
from lowmem.config.load import load
from lowmem.config.recipes import recipes
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan

QUICK = ("galore-60m", "apollo-mini-60m-tuned", "q-apollo-60m")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(recipe.name, marks=() if recipe.name in QUICK else pytest.mark.slow)
        for recipe in recipes()
    ],
)
def test_a_recipe_plans_as_it_stands(name: str) -> None:
    asked, notes = settle(load({"recipe": name}, environ={}).config, cuda=True)
    plan = make_plan(asked, find_card("a100-80gb", "cuda"), notes)
    assert plan.fits
    assert plan.memory.reserved > 0
    chosen = plan.config
    assert chosen.optimizer.lr == asked.optimizer.lr
    assert chosen.optimizer.weight_decay == asked.optimizer.weight_decay
    assert chosen.optimizer.rank == asked.optimizer.rank
    assert asked.optimizer.states in ("auto", chosen.optimizer.states)
    assert chosen.optimizer.options.items() >= asked.optimizer.options.items()
    assert chosen.train.weights == asked.train.weights
    assert chosen.train.clip == asked.train.clip
    assert chosen.train.batch == asked.train.batch
    assert chosen.train.updates == asked.train.updates
