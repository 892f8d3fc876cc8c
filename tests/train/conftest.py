"""Configurations that need no planner, for the tests of single parts of a run."""

from collections.abc import Callable
from typing import Any

import pytest

from lowmem.config.schema import Config


@pytest.fixture
def ready_config(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """tiny_config with a method and everything else that the planner would fill in."""

    def make(**sections: Any) -> Config:
        filled = {"micro_batch": 8, "update": "unfused", "recompute": "keep", "clip": "off"}
        optimizer = {"method": "galore", "rank": 4, "lr": 0.01} | sections.pop("optimizer", {})
        train = filled | sections.pop("train", {})
        return tiny_config(optimizer=optimizer, train=train, **sections)

    return make
