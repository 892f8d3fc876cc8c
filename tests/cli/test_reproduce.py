"""`lowmem reproduce` and `lowmem results` as users call them, on a model of a few weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli.main import run as command
from lowmem.train.run import Run
from lowmem.train.timing import Pace, measured_pace, scale_for
from tests.conftest import TINY_MODEL


@pytest.fixture
def arguments(tiny_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> list[str]:
    """galore-60m with a tiny model: 6 updates of 4 documents, a checkpoint after every two."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"model_type": "llama", **TINY_MODEL}))
    return [
        *("reproduce", "galore-60m", "--scale", "0.0006", "--batch", "4seq", "--rank", "4"),
        *("--model", str(path), "--data", str(tiny_text), "--tokenizer", str(tiny_tokenizer)),
        *("--seq-len", "32", "--device", "cpu", "--save-every", "2", "--keep", "9"),
        # All that a planner could choose, so that it has nothing to compare.
        *("--micro-batch", "4", "--update", "unfused", "--recompute", "keep", "--logits", "keep"),
        *("--out", str(tmp_path / "runs"), "--quiet", "--set", "optimizer.side=left"),
    ]


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_shortened_reproduction_says_so_and_goes_on_by_the_same_command(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*arguments, "--json"]) == 0
    first = told(capsys)
    folder = tmp_path / "runs" / "galore-60m-x0.0006"
    assert first["verdict"] == "shortened: not comparable"
    assert first["published"] == 34.88
    assert first["measured"] < first["true_perplexity"]
    assert json.loads((folder / "verdict.json").read_text())["measured"] == first["measured"]
    assert first["verdict"] in (folder / "report.html").read_text()
    config = Run.open(folder).config
    assert (config.train.updates, config.run.recipe) == (6, "galore-60m")

    shutil.rmtree(folder / "checkpoints" / "step-000006")  # as if it had been killed before
    (folder / "latest").write_text("step-000004\n")
    (folder / "verdict.json").unlink()
    assert command([*arguments, "--json"]) == 0
    assert told(capsys) == first
    assert command([*arguments, "--lr", "0.1"]) == 2
    assert "begun by another command" in capsys.readouterr().err

    assert command(arguments) == 0  # it is finished: only the verdict, with every deviation
    out = capsys.readouterr().out

    for part in (
        "shortened: not comparable",
        "34.88 +- 0.35  arXiv:2403.03507, Table 2",
        "train.updates = 6, the recipe has 10,000",
        "model: not llama-60m",
        "the text is not the whole of C4",
        "optimizer.options.side = left, the recipe leaves it open",
        "bf16 weights are written with stochastic rounding",
    ):
        assert part in out


def test_a_dry_run_stops_at_the_plan(arguments: list[str], tmp_path: Path) -> None:
    assert command([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()


def budgeted(arguments: list[str], budget: str) -> list[str]:
    at = arguments.index("--scale")
    return [*arguments[:at], "--budget", budget, *arguments[at + 2 :]]


def test_a_budget_of_time_chooses_the_scale(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """10,000 updates of a second and 50 refreshes of 2: 6.6 of 10,000 in 106.6 s - 100 s."""
    pace = Pace(0.75, 0.25, 2.0)
    monkeypatch.setattr("lowmem.train.timing.measured_pace", lambda config: pace)
    monkeypatch.setattr("lowmem.train.timing._EVALUATION", 0.0)
    spoken = [word for word in budgeted(arguments, "106.6s") if word != "--quiet"]
    assert command([*spoken, "--dry-run"]) == 0
    assert "shortened to 0.00066 of the published run" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert command(budgeted(arguments, "100s")) == 2
    assert "too short for one update" in capsys.readouterr().err


def test_the_pace_of_a_run_adds_up(tiny_config: Callable[..., Any]) -> None:
    chosen = {"update": "unfused", "recompute": "keep", "clip": "off"}
    config = tiny_config(
        train={"updates": 100, "micro_batch": 4, "batch": "8seq", **chosen},
        optimizer={"method": "galore", "rank": 4, "lr": 0.01, "gap": 20},
        evaluate={"every": 50, "tokens": 64 * 32},
    )
    pace = measured_pace(config)
    assert pace.micro_batch > 0
    assert pace.step > 0
    choice = type("Choice", (), {"accumulate": 2, "micro_batch": 4})
    shrinks, fixed = Pace(3.0, 1.0, 0.5).whole(config, choice)  # type: ignore[arg-type]
    assert shrinks == pytest.approx(100 * 7.0 + 3 * (64 / 4) * 1.0)
    assert fixed == pytest.approx(5 * 0.5)
    assert scale_for(10.0, 16.0, 2.0) == 0.5
    assert scale_for(1000.0, 16.0, 2.0) == 1.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "1h"], "--scale and --budget exclude one another"),
        (["--scale", "2"], "--scale 2"),
        (["--protocol", "gallore"], "data.protocol"),
    ],
)
def test_contradictions_are_refused(
    arguments: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*arguments, *more]) == 2
    assert said in capsys.readouterr().err


def test_bad_names_and_budgets_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["reproduce", "galore-61m"]) == 2
    assert "did you mean `galore-60m`?" in capsys.readouterr().err
    assert command(budgeted(arguments, "soon")) == 2
    assert "write it like 30min" in capsys.readouterr().err


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["reproduce", "list", "--json"]) == 0
    listed = {one["name"]: one for one in told(capsys)["recipes"]}
    assert listed["galore-60m"]["published_perplexity"] == 34.88
    assert listed["galore-60m"]["settings"]["optimizer"]["rank"] == 128
    assert listed["galore-1b-script"]["published_perplexity"] is None
    assert command(["reproduce", "list"]) == 0
    assert "apollo-mini-350m-tuned" in capsys.readouterr().out


def test_published_results_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["results", "--model", "llama-7b", "--method", "galore", "--json"]) == 0
    found = told(capsys)
    assert {row["ppl"] for row in found["perplexities"]} >= {14.65, 17.94}
    assert ("memory of training", 22.0) in {(row["what"], row["value"]) for row in found["figures"]}
    readings = {row["reading"] for row in [*found["perplexities"], *found["figures"]]}
    assert readings <= {"as printed", "quoted", "recomputed", "from memory"}
    assert command(["results", "--method", "galor"]) == 2
    assert "did you mean `galore`?" in capsys.readouterr().err
