"""The printed command line gives the same configuration; a plan that does not fit is explained."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli import plan as plan_command
from lowmem.cli.main import run
from lowmem.cli.options import SETTINGS, SWITCHES, Given
from lowmem.cli.settings import explicit_command, require_fit
from lowmem.config.flags import FLAGS
from lowmem.config.load import load
from lowmem.config.schema import Config
from lowmem.errors import PlanError
from lowmem.planner.plan import Plan
from lowmem.units import GIB
from tests.cli.example_plan import example_plan

NOTHING = Given({}, [], [], quiet=True)


def typed(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> Config:
    """The configuration that `lowmem train WORDS` would start from."""
    seen: list[Given] = []
    # `plan` takes the settings of `train` and starts nothing.
    monkeypatch.setattr(plan_command, "plan", lambda given, asked, as_json: seen.append(given))
    assert run(["plan", *words]) == 0
    given = seen[0]
    return load(given.flags, given.files, {}, given.assignments).config


SETTLED: list[dict[str, Any]] = [
    {},
    {"model": "llama-60m", "gpu": "24GB", "data": {"source": "my data", "skip_bad": True}},
    {"optimizer": {"method": "galore", "lr": 0.01, "rank": 0.25, "gap": 50, "scale": 0.5}},
    {"optimizer": {"rank": {"mlp": 64, "attention": 32}, "betas": [0.9, 0.95], "side": "left"}},
    {"optimizer": {"rest": {"method": "adamw", "options": {"eps": 1e-9}}}},
    {"train": {"updates": 7, "batch": "8seq", "clip": "off", "seed": 3, "update": "fused"}},
    {"train": {"tokens": 1000}, "schedule": {"warmup": 5, "min_ratio": 0.2, "kind": "wsd"}},
    {"run": {"name": "a b"}, "checkpoint": {"every": 5}, "evaluate": {"every": 0, "tokens": 9}},
]


@pytest.mark.parametrize("settled", SETTLED)
def test_the_explicit_command_means_the_same(
    monkeypatch: pytest.MonkeyPatch, settled: dict[str, Any]
) -> None:
    config = Config.model_validate(settled)
    plan = Plan(config, *(getattr(example_plan(), n) for n in ("card", "choice", "memory")))
    words = shlex.split(explicit_command(plan, NOTHING, str(config.model)))
    assert words[:2] == ["lowmem", "train"]
    assert typed(monkeypatch, words[2:]) == config


def test_an_inline_model_stays_in_its_file() -> None:
    given = Given({}, [Path("run.toml")], [], quiet=True)
    command = explicit_command(example_plan(), given, None)
    assert command.startswith("lowmem train --config run.toml ")
    assert "--model" not in command


def test_every_configuration_flag_is_an_option() -> None:
    assert {setting.flag for setting in SETTINGS} | {each[0] for each in SWITCHES} == set(FLAGS)


def test_flags_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "--rank 64 --clip off --tokens 1.1B --skip-bad --compile --gap 10 --set run.name=x -q -v"
    )
    config = typed(monkeypatch, words.split())
    assert config.optimizer.rank == 64
    assert config.optimizer.options == {"gap": 10}
    assert (config.train.clip, config.train.tokens) == ("off", 1_100_000_000)
    assert config.data.skip_bad
    assert config.train.compile
    assert config.run.name == "x"


def test_a_plan_that_fits_passes() -> None:
    require_fit(example_plan())


def test_a_plan_that_does_not_fit_names_parts_and_fixes() -> None:
    with pytest.raises(PlanError) as caught:
        require_fit(example_plan(reserved=23 * GIB))
    error = caught.value
    assert error.exit_code == 3
    assert "23.0 GiB needed, 22.5 GiB usable on RTX 4090" in error.what
    assert "largest parts: weights 13.0 GiB, states 3.00 GiB, activations 2.00 GiB" in error.why
    assert error.fix.splitlines() == [
        "--rank 256       -2.00 GiB, fits",
        "--micro-batch 4  -512.0 MiB",
    ]
