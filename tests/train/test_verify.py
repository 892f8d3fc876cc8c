"""`plan --verify`: the real updates of a plan, measured beside what was rehearsed."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.errors import HardwareError
from lowmem.optim.optimizer import Optimizer
from lowmem.planner.calibration import Row
from lowmem.planner.hardware import SmiReading, find_card
from lowmem.planner.plan import Plan
from lowmem.planner.rehearse import EVALUATE, GATHER, STEP
from lowmem.planner.search import make_plan
from lowmem.train.verify import BUILD, SAVE, WHOLE, Verification, verify

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def plan_of(config: Config) -> Plan:
    return make_plan(config, find_card("24GB", "cpu"), [])


def by_name(verification: Verification) -> dict[tuple[str, str], Row]:
    return {(row.segment, row.what): row for row in verification.rows}


@pytest.mark.parametrize(
    ("mode", "weights", "micro_batch"),
    [("unfused", "fp32", 8), ("fused+subspace", "bf16", 2), ("fused", "bf16", 8)],
)
def test_a_plan_is_equal_to_the_byte_in_every_segment_that_computes(
    mode: str, weights: str, micro_batch: int, tiny_config: MakeConfig
) -> None:
    train = {"update": mode, "weights": weights, "micro_batch": micro_batch}
    clip = {"clip": "off"} if mode == "fused" else {}
    plan = plan_of(
        tiny_config(optimizer={"method": "galore", "rank": 8, "states": "8bit"}, train=train | clip)
    )
    verification = verify(plan, [])
    rows = by_name(verification)
    exact = [(BUILD, "weights"), (BUILD, "states"), (BUILD, "projections")]
    exact += [(GATHER, "tensors"), (STEP, "tensors"), (WHOLE, "tensors")]
    exact += [(GATHER, "activations, loss, gradients"), (GATHER, "held at its end")]
    exact += [(STEP, "temporaries")]
    assert {key: rows[key].error for key in exact} == dict.fromkeys(exact, 0.0)
    assert rows[WHOLE, "tensors"].planned == plan.memory.tensors
    # The rehearsal has the evaluated text on the device; on the CPU it is numpy's memory.
    for segment in (EVALUATE, SAVE):
        row = rows[segment, "tensors"]
        assert row.measured is not None
        assert abs(row.planned - row.measured) <= 8 * 512
    assert "were not checked" in verification.note


def test_a_method_that_takes_more_than_it_declared_is_found(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny_config(optimizer={"method": "adamw"}))
    plain = Optimizer.step

    def wasteful(self: Optimizer) -> None:
        unplanned = None
        if not next(iter(self.slots.values())).weight.is_meta:
            unplanned = torch.zeros(2**20)
        plain(self)
        del unplanned

    monkeypatch.setattr(Optimizer, "step", wasteful)
    verification = verify(plan, [])
    assert not verification.is_right
    wrong = {row.segment for row in verification.rows if not row.is_right}
    assert STEP in wrong
    assert wrong <= {STEP, WHOLE}


def test_nothing_of_the_run_is_left_but_the_calibration(
    tiny_config: MakeConfig, home: Path
) -> None:
    plan = plan_of(tiny_config(optimizer={"method": "adamw"}))
    verification = verify(plan, [], "lowmem plan --verify")
    assert os.listdir(home) == []
    assert not Path(plan.config.run.out).exists()
    path = verification.calibration.write()
    assert [found for found in home.rglob("*") if found.is_file()] == [path]
    assert verification.calibration.command == "lowmem plan --verify"
    assert verification.calibration.rows[0]["segment"] == BUILD
    assert verification.calibration.context is None  # a CPU has none, and nothing was invented


def test_a_plan_larger_than_the_machine_is_refused_before_it_runs(tiny_config: MakeConfig) -> None:
    plan = plan_of(tiny_config(optimizer={"method": "adamw"}))
    plan = replace(plan, memory=replace(plan.memory, reserved=2**60))
    with pytest.raises(HardwareError, match="cannot be verified here") as caught:
        verify(plan, [])
    assert caught.value.exit_code == 8
    assert caught.value.fix


@pytest.fixture
def cuda_config(tiny_config: MakeConfig) -> MakeConfig:
    from lowmem.config.presets import read_preset

    def make(**sections: Any) -> Config:
        train = {"device": "cuda", "weights": "bf16", "batch": "8seq"} | sections.pop("train", {})
        return tiny_config(model=read_preset("llama-130m").model_dump(), train=train, **sections)

    return make


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gpu", ["8GB", "12GB"])
@pytest.mark.parametrize("method", ["adam8bit", "galore", "apollo"])
def test_on_a_card_a_plan_is_right_inside_its_budget(
    gpu: str, method: str, cuda_config: MakeConfig
) -> None:
    before = SmiReading.all()
    plan = make_plan(cuda_config(optimizer={"method": method}), find_card(gpu, "cuda"), [])
    verification = verify(plan, before)
    assert [row for row in verification.rows if not row.is_right] == []
    whole = by_name(verification)[WHOLE, "reserved"]
    assert whole.measured is not None
    assert whole.measured <= plan.card.usable_bytes
    kept = verification.calibration
    assert kept.tflops is not None
    assert kept.bandwidth is not None
    assert kept.workspace is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_the_process_is_capped_at_the_plans_budget(cuda_config: MakeConfig) -> None:
    from lowmem.errors import OutOfMemoryError

    plan = make_plan(cuda_config(optimizer={"method": "adamw"}), find_card("12GB", "cuda"), [])
    short = plan.card.usable_bytes - plan.memory.reserved // 2
    capped = replace(plan, card=replace(plan.card, margin=plan.card.margin + short))
    with pytest.raises(OutOfMemoryError, match="although the plan fitted"):
        verify(capped, SmiReading.all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_card_the_next_plan_uses_what_was_measured(cuda_config: MakeConfig) -> None:
    before = SmiReading.all()
    if not before:
        pytest.skip("nvidia-smi does not answer")
    config = cuda_config(optimizer={"method": "galore"})
    verification = verify(make_plan(config, find_card("12GB", "cuda"), []), before)
    path = verification.calibration.write()
    card = find_card("auto", "cuda")
    assert card.calibration is not None
    assert str(path) in card.calibration
    assert card.context == verification.calibration.context
