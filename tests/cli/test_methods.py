"""`lowmem methods`."""

import json

import pytest

from lowmem.cli.main import run
from lowmem.cli.methods import composition
from lowmem.optim.methods import METHODS


def test_the_list_names_every_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # narrower, summaries take two lines
    assert run(["methods"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line.strip()]
    assert names == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_shows_its_parts_arguments_and_source(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["methods", name]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert METHODS[name].source in text
    for argument in METHODS[name].arguments:
        assert f" {argument} " in text
    for part in composition(METHODS[name].build()):
        assert f" {part} " in text


def test_json_holds_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "galore", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["arguments"]["gap"] == 200
    assert record["composition"]["projector"].startswith("SVD(rank=128")
    assert run(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)["methods"]] == list(METHODS)


def test_an_unknown_method_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "galor"]) == 2
    assert "did you mean `galore`?" in capsys.readouterr().err
