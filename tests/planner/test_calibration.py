"""What was measured on a card is used on that card, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.planner.calibration import Calibration, Row, find, folder
from lowmem.planner.hardware import SmiReading, find_card
from lowmem.planner.workspaces import CUBLAS_WORKSPACE
from lowmem.units import GIB, MIB

FACTS: dict[str, Any] = {
    "date": "2026-11-21T13:00:00Z",
    "lowmem": "0.1.0",
    "torch": torch.__version__,
    "driver": "581.57",
    "name": "NVIDIA GeForce RTX 4090",
    "uuid": "4b1f",
    "total": 24564 * MIB,
    "context": 411 * MIB,
    "workspace": 17 * MIB,
    "tflops": 150.0,
    "bandwidth": 900.0,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path))
    return tmp_path


def kept(**other: Any) -> Path:
    return Calibration(**(FACTS | other)).write()


def test_a_calibration_is_read_as_it_was_written(home: Path) -> None:
    path = kept(rows=[{"segment": "update", "what": "reserved", "planned": 2, "measured": 1}])
    assert path == home / "cards" / f"4b1f-581.57-{torch.__version__}.json"
    found = find(lambda calibration: True)
    assert found.path == path
    assert found.calibration == Calibration.model_validate_json(path.read_bytes())
    assert found.warnings == []


def test_the_same_card_is_planned_with_what_was_measured() -> None:
    preset = find_card("rtx4090", "auto")
    path = kept()
    card = find_card("rtx4090", "auto")
    assert (card.context, card.workspace) == (411 * MIB, 17 * MIB)
    assert (card.total, card.others, card.margin) == (preset.total, preset.others, preset.margin)
    assert card.calibration == f"{path} of 2026-11-21T13:00:00Z"
    assert card.presets == ["others", "margin"]
    assert card.rates is not None
    assert (card.rates.tflops, card.rates.bandwidth, card.rates.measured) == (150.0, 900.0, True)


@pytest.mark.parametrize("gpu", ["rtx3090", "24GB", "24GiB"])
def test_another_card_or_a_mere_size_does_not_use_it(gpu: str) -> None:
    before = find_card(gpu, "auto")
    kept()
    assert find_card(gpu, "auto") == before
    assert before.workspace == CUBLAS_WORKSPACE
    assert "context" in before.presets


def test_another_torch_does_not_use_it() -> None:
    kept(torch="2.0.0")
    assert find_card("rtx4090", "auto").calibration is None


def test_the_newest_wins() -> None:
    kept(context=1 * MIB)
    kept(context=2 * MIB, date="2026-11-22T13:00:00Z", driver="582.00")
    assert find_card("rtx4090", "auto").context == 2 * MIB


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Invalid JSON"),
        ("{}", "date: Field required"),
        ("[1]", "an object"),
        (json.dumps(FACTS | {"schema_version": 2}), "schema_version"),
        (json.dumps(FACTS | {"context": -1}), "context"),
        (json.dumps(FACTS | {"context": 10 * GIB}), "context"),
        (json.dumps(FACTS | {"workspace": "17"}), "workspace"),
        (json.dumps(FACTS | {"surprise": 1}), "surprise"),
        (json.dumps(FACTS | {"uuid": "other"}), "it says of itself that it is other-"),
    ],
)
def test_a_broken_or_foreign_file_is_named_and_ignored(text: str, reason: str) -> None:
    path = kept()
    path.write_text(text)
    card = find_card("rtx4090", "auto")
    assert card.calibration is None
    assert card.context == 500 * MIB
    (warning,) = card.warnings
    assert str(path) in warning
    assert "ignored" in warning
    assert reason in warning


def test_without_measurements_there_is_nothing_to_warn_of() -> None:
    assert not folder().exists()
    assert find_card("rtx4090", "auto").warnings == ()


@pytest.mark.parametrize(
    ("planned", "measured", "right"),
    [
        (1000, 1000, True),
        (1000, 1010, True),
        (1000, 1011, False),
        (1000, 980, True),
        (1000, 979, False),
        (0, 0, True),
        (0, 1, False),
        (1000, None, True),
    ],
)
def test_a_plan_may_be_two_percent_over_and_one_under(
    planned: int, measured: int | None, right: bool
) -> None:
    assert Row("update", "reserved", planned, measured).is_right is right


def test_what_the_plan_does_not_answer_for_is_never_wrong() -> None:
    assert Row("whole run", "device", 1000, 700, is_promise=False).is_right


def test_nvidia_smi_is_read_by_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        stdout = "GPU-4b1f, 581.57, 812\nGPU-77aa, 581.57, 3\nnonsense\nGPU-1, 2, [N/A]\n"

    monkeypatch.setattr("subprocess.run", lambda *arguments, **options: Told())
    assert SmiReading.all() == [
        SmiReading("4b1f", "581.57", 812 * MIB),
        SmiReading("77aa", "581.57", 3 * MIB),
    ]


def test_without_nvidia_smi_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr("subprocess.run", missing)
    assert SmiReading.all() == []
