"""`lowmem config`."""

import json
import tomllib
from pathlib import Path

import pytest

from lowmem.cli.main import run
from lowmem.config.schema import Config


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOWMEM_CONFIG", "LOWMEM_RANK", "LOWMEM_RNAK"):
        monkeypatch.delenv(name, raising=False)


def test_show_prints_toml_that_is_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "--rank", "64", "--name", "a"]) == 0
    shown = Config.model_validate(tomllib.loads(capsys.readouterr().out))
    expected = {"optimizer": {"rank": 64}, "run": {"name": "a"}}
    assert shown == Config.model_validate(expected)


def test_show_tells_where_values_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_RANK", "32")
    monkeypatch.setenv("LOWMEM_RNAK", "32")
    path = tmp_path / "run.toml"
    path.write_text("[train]\nseed = 7\n")
    assert run(["config", "show", "-c", str(path), "--lr", "0.5", "--origin"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["optimizer.rank"][1:] == ["32", "environment", "LOWMEM_RANK"]
    assert rows["optimizer.lr"][1:] == ["0.5", "flag", "--lr"]
    assert rows["train.seed"][1] == "7"
    assert rows["train.clip"][1:] == ['"auto"', "default"]
    assert "did you mean `LOWMEM_RANK`" in err
    assert run(["config", "show", "--lr", "0.5", "--origin", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["optimizer"]["lr"] == 0.5
    assert record["origins"]["optimizer.lr"] == "flag --lr"


def test_check_accepts_good_files_and_refuses_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[optimizer]\nmethod = "galore"\ngap = 10\n')
    bad.write_text("[optimiser]\nrank = 3\n")
    assert run(["config", "check", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: ok\n"
    assert run(["config", "check", str(bad)]) == 2
    assert f"error: 1 problem in {bad} (exit 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('method = "galor"', "did you mean `galore`?"),
        ('method = "galore"\ngapp = 10', "did you mean `gap`?"),
        ('method = "galore"\ngap = 0', "optimizer.gap = 0 does not suit method 'galore'"),
        ('[optimizer.rest]\nmethod = "adamm"', "did you mean `adamw`?"),
    ],
)
def test_check_knows_methods_and_their_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[optimizer]\n{text}\n")
    assert run(["config", "check", str(path)]) == 2
    assert complaint in capsys.readouterr().err


def test_check_tells_all_that_is_unknown_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('model = "llama-61m"\ngpu = "rtx9999"\n[optimizer]\nmethod = "galor"\n')
    assert run(["config", "check", str(path)]) == 2
    told = capsys.readouterr().err
    assert "3 settings are wrong" in told
    assert all(word in told for word in ("llama-61m", "rtx9999", "galor"))


def test_check_tells_wrong_values_and_unknown_names_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        'model = "llama-61m"\n[optimizer]\nmethod = "galore"\ngapp = 5\nrank = -3\n'
        '[train]\nupdates = 10\ntokens = "1B"\nbatch = "x"\n[nosuch]\na = 1\n'
    )
    assert run(["config", "check", str(path)]) == 2
    told = capsys.readouterr().err
    for words in (
        "llama-61m",
        "gapp",
        "optimizer.rank",
        "give one of",
        "'x' is no batch",
        "nosuch",
    ):
        assert told.count(words) == 1, told


def test_the_schema_describes_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
