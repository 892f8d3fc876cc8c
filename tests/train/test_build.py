"""What a run needs of its machine."""

from collections.abc import Callable

import pytest

from lowmem.config.schema import Config
from lowmem.errors import ConfigError
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.train.build import build

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("processes", ["2", "many"])
def test_a_launcher_of_several_processes_is_refused(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE={processes}: a run is one process"):
        build(tiny_config())


def test_a_launcher_of_one_process_is_not(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    build(make_plan(tiny_config(), find_card("24GB", "cpu"), []).config)
