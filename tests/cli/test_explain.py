"""`lowmem plan --why`, `--compare`, the cache of plans, and what needs no torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli.main import run
from lowmem.planner import search
from lowmem.planner.plan import Plan

ROOT = Path(__file__).parents[2]
TINY = [
    *("--model", "llama-tiny", "--updates", "5", "--batch", "4seq", "--states", "fp32"),
    *("--weights", "bf16"),
    *("--method", "adamw", "--recompute", "keep", "--update", "unfused", "--micro-batch", "4"),
]


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache that the tests of this file share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("COLUMNS", "120")
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cards that plans are made for, instead of taken from the cache."""
    cards: list[str] = []
    make = search.make_plan

    def counted(config: Any, card: Any, *more: Any) -> Plan:
        cards.append(card.name)
        return make(config, card, *more)

    monkeypatch.setattr(search, "make_plan", counted)
    return cards


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert run(["plan", *TINY, *words]) == 0
    return capsys.readouterr().out


def test_a_plan_is_made_once(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = told(capsys, "--gpu", "5GB", "--json")
    assert told(capsys, "--gpu", "5GB", "--json") == first
    assert len(made) == 1
    assert told(capsys, "--gpu", "5GB", "--json", "--no-cache") == first
    assert len(made) == 2
    told(capsys, "--gpu", "5GB", "--updates", "6")
    assert len(made) == 3


def test_what_this_machine_has_left_is_measured_every_time(
    made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        told(capsys, "--device", "cpu")
    assert made == ["host memory"] * 2


def test_training_makes_its_own_plan(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(["train", *TINY, "--gpu", "5GB", "--dry-run"]) == 0
    assert len(made) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(
    made: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "file"))
    assert "fits" in told(capsys, "--gpu", "5GB")


def test_a_real_plan_is_read_back_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(told(capsys, "--gpu", "5GB", "--json"))
    plan = Plan.from_json(record)
    assert plan.to_json() == record
    assert plan.memory.phases[0].tensors == plan.memory.tensors


def test_verbose_shows_the_peak_of_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Peak by phase" not in told(capsys, "--gpu", "5GB")
    table = told(capsys, "--gpu", "5GB", "-v").partition("Peak by phase")[2]
    assert all(f"  {phase} " in table for phase in ("forward", "backward", "update", "evaluation"))


def test_why_shows_the_method_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "--gpu", "5GB", "--why", "galore")
    lines = text.splitlines()
    assert lines[0].startswith("galore on 5GB card")
    assert lines[0].endswith(": it fits, but you named adamw")
    head = next(line for line in lines if "(the plan)" in line)
    assert head.split() == ["adamw", "(the", "plan)", "galore"]
    column = head.index("galore")
    for name in ("rank", "weights and states", "gradients held", "peak, reserved", "quality"):
        row = next(line for line in lines if line.startswith(f"  {name} "))
        assert row[column - 1] == " " != row[column]
    assert "galore: +" in text  # the penalty's source
    assert "arXiv:2403.03507" in text


@pytest.mark.parametrize(
    ("method", "reason"),
    [("adamw", "chosen: you named it"), ("auto", "chosen: the best published quality that fits")],
)
def test_why_answers_for_the_chosen_method_too(
    method: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, "--gpu", "5GB", "--method", method, "--why", "adamw")
    assert reason in text
    assert text.count("adamw (the plan)") == 1


def test_why_names_what_is_short_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "940MiB", "--why", "lion", "--method", "scale"]
    text = told(capsys, *words)
    record = json.loads(told(capsys, *words, "--json"))
    plan = Plan.from_json(record["plan"])
    assert "too much" in text.splitlines()[0]
    helps = text.partition("What would make it fit\n")[2].splitlines()
    expected = plan.fix_lines or ["a smaller --model, or a larger --gpu"]
    assert [line.strip() for line in helps] == [line.strip() for line in expected]
    assert record["obstacle"]["short"] > 0
    assert not plan.fits
    assert record["plan"]["choice"]["method"] == record["method"] == "lion"
    assert record["chosen"]["choice"]["method"] == "scale"


def test_compare_has_a_row_for_each_card(
    made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, "--compare", "840MiB, 6GB,rtx4090")
    rows = [line.split() for line in text.splitlines()[:4]]
    assert rows[0][:3] == ["card", "fits", "method"]
    assert [row[:2] for row in rows[1:]] == [["840MiB", "no"], ["6GB", "yes"], ["rtx4090", "yes"]]
    assert len(made) == 3
    plans = json.loads(told(capsys, "--compare", "840MiB,6GB,rtx4090", "--json"))
    assert [Plan.from_json(plan).fits for plan in plans] == [False, True, True]
    assert len(made) == 3


def test_compare_says_what_became_other_than_one_would_expect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, note = search.make_plan, "batch 1seq instead of 4, which do not fit"

    def smaller(*arguments: Any) -> Plan:
        plan = make(*arguments)
        return replace(plan, notes=[note, *plan.notes])

    monkeypatch.setattr(search, "make_plan", smaller)
    assert f"\n6GB: {note}\n" in told(capsys, "--compare", "6GB", "--no-cache")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--why", "galor"], 2, ["'galor' is unknown", "did you mean `galore`?"]),
        (["--compare", "12GB,rtx4091"], 2, ["'rtx4091'", "did you mean rtx4090"]),
        (["--compare", "12GB,,24GB"], 2, ["'12GB,,24GB' has an empty place"]),
        (["--compare", ""], 2, ["'' has an empty place"]),
        (["--compare", "850MiB,840MiB"], 3, ["nothing fits any of 850MiB, 840MiB", "nearest is"]),
        (["--compare", "12GB", "--why", "galore"], 2, ["--compare and --why exclude"]),
        (["--compare", "12GB", "--gpu", "24GB"], 2, ["--compare and --gpu exclude"]),
    ],
)
def test_wrong_questions_are_told_in_three_parts(
    words: list[str], code: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *TINY, *words]) == code
    err = capsys.readouterr().err
    assert all(part in err for part in [*said, "  fix: "])


WITHOUT_TORCH = [
    (["--help"], 0),
    (["plan", "--help"], 0),
    (["plan", "--schema"], 0),
    (["plan", "--gpu", "rtx4091"], 2),
    (["plan", "--gpu", "0GB"], 2),
    (["plan", "--gpu", "3TB"], 2),
    (["plan", "--model", "llama-8b"], 2),
    (["plan", "--gpu", "24GB", "--batch", "0seq"], 2),
    (["plan", "--gpu", "24GB", "--seq-len", "99999"], 2),
    (["plan", "--compare", "8GB,9"], 2),
    (["plan", *TINY, "--gpu", "5GB"], 0),
    (["plan", *TINY, "--compare", "6GB,rtx4090"], 0),
    (["plan", *TINY, "--gpu", "5GB", "--why", "galore", "--json"], 0),
]


def test_known_plans_help_and_errors_import_no_torch() -> None:
    """All in one process: whichever imports it is named."""
    for words in (
        ["--gpu", "5GB"],
        ["--compare", "6GB,rtx4090"],
        ["--why", "galore", "--gpu", "5GB"],
    ):
        assert run(["plan", *TINY, *words]) == 0
    code = (
        "import sys\n"
        "from lowmem.cli.main import run\n"
        "heavy = {'torch', 'numpy', 'transformers', 'bitsandbytes'}\n"
        f"for words, code in {WITHOUT_TORCH!r}:\n"
        "    assert run(words) == code, words\n"
        "    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
