"""`lowmem doctor`."""

import json
from pathlib import Path

import pytest

from lowmem.cli import doctor
from lowmem.cli.main import run


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    record = json.loads(capsys.readouterr().out)
    return {check["name"]: check for check in record["checks"]}


def test_a_working_machine_exits_with_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOWMEM_RNAK", "3")
    assert run(["doctor", "--json"]) == 0
    checks = report(capsys)
    assert checks["torch"]["text"].split("+")[0] == torch.__version__.split("+")[0]
    assert checks["cache"]["state"] == "ok"
    assert checks["LOWMEM_HOME"]["text"] == str(tmp_path / "cache")
    assert checks["LOWMEM_RNAK"]["state"] == "note"
    assert checks["LOWMEM_RNAK"]["fix"] == "did you mean `LOWMEM_RANK`?"
    assert ("device" in checks) != torch.cuda.is_available()


def test_a_cache_that_cannot_be_written_exits_with_eight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LOWMEM_HOME", str(blocked / "cache"))
    assert run(["doctor"]) == 8
    out, err = capsys.readouterr()
    assert "!!" in out
    assert "error: broken: cache (exit 8)" in err
    assert "fix: set LOWMEM_HOME" in err


def test_a_missing_required_package_is_broken_and_an_optional_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "_OPTIONAL", ("no-such-extra",))
    assert run(["doctor", "--json"]) == 8
    checks = report(capsys)
    assert checks["no-such-package"]["state"] == "broken"
    assert checks["no-such-extra"]["state"] == "note"
