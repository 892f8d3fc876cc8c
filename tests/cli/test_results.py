"""compare, plot and report as users type them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli.main import run
from tests.analysis.conftest import Make, make_run  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["compare", "plot", "report"])
def test_results_are_shown_without_torch(make_run: Make, command: str) -> None:  # noqa: F811
    folder = make_run("a")
    code = (
        "import sys\n"
        "from lowmem.cli.main import run\n"
        f"code = run([{command!r}, {str(folder)!r}])\n"
        "sys.exit(code or ('torch' in sys.modules) * 99)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["compare", "plot", "report"])
def test_what_is_no_run_is_told_in_three_parts(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, str(tmp_path)]) == 5
    err = capsys.readouterr().err
    assert "is no run" in err
    assert "\n  fix: " in err


def test_a_table_is_marked_where_it_compares_the_unequal(
    make_run: Make,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other = make_run("a"), make_run("b", method="galore", eval_tokens=10)
    assert run(["compare", str(one), str(other)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("not comparable: evaluation: ")
    assert out.count("unfair") == 2
    assert "54.598" in out


def test_a_fair_table_shows_interval_and_pareto(
    make_run: Make,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [make_run(f"a{n}", seed=n, final=4.0 + n / 100) for n in range(2)]
    runs += [make_run(f"b{n}", seed=n, final=4.5 + n / 100, method="galore") for n in range(2)]
    assert run(["compare", *map(str, runs)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "not comparable" not in first
    assert [line.split()[-1] for line in rest[:2]] == ["yes", "1"]
    assert rest[2:4] == [f"1: {runs[0]}, {runs[1]}", f"2: {runs[2]}, {runs[3]}"]
    assert "51.49..58.47" in rest[0]  # exp(4.005 +- 12.7062 * 0.00707 / sqrt 2)
    assert run(["compare", *map(str, runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparable"]


def test_a_plot_is_as_wide_as_the_terminal(
    make_run: Make,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["plot", str(make_run("a")), "--y", "loss"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 70 < max(map(len, lines)) <= 80


def test_a_plot_goes_into_a_file(
    make_run: Make,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.svg"
    assert run(["plot", str(make_run("a")), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "<svg" in out.read_text()


def test_a_report_says_where_it_is(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    folder = make_run("a")
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
