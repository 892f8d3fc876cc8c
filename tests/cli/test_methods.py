"""`lowmem methods`."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import run
from lowmem.cli.methods import state_bytes
from lowmem.config.presets import read_preset
from lowmem.config.schema import OptimizerConfig
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer, takes_rank
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.composition import by_role
from lowmem.optim.methods import METHODS

Capture = pytest.CaptureFixture[str]


def shown(*words: str, columns: int = 200) -> str:
    """What the command prints on a terminal of that width; narrow ones fold cells."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", str(columns))
        assert run(["methods", "-q", *words]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def listed() -> list[list[str]]:
    """The rows of the list, in words."""
    return [line.split() for line in shown().splitlines()]


def test_the_list_has_a_line_for_every_method(listed: list[list[str]]) -> None:
    assert listed[0] == ["method", "fp32", "bf16", "8bit", "updates", "arXiv", "summary"]
    assert [row[0] for row in listed[1:]] == list(METHODS)


def test_the_list_fits_a_hundred_columns() -> None:
    assert max(map(len, shown(columns=100).splitlines())) <= 100


def test_the_list_shows_formats_modes_and_source(listed: list[list[str]]) -> None:
    rows = {row[0]: row[1:] for row in listed}
    assert rows["adamw"][:7] == ["8.00", "4.00", "2.03", "U", "F", "L", "1711.05101"]
    assert rows["adam8bit"][:2] == ["-", "-"]
    assert rows["galore"][3:8] == ["U", "S", "F", "L", "2403.03507"]
    assert " ".join(rows["galore"][8:]).startswith("Adam in the leading singular subspace")


def test_bytes_of_galore_are_those_of_its_sheet() -> None:
    """At 1B, rank 512: bf16 basis (s x r), two float32 moments (r x b), three figures for the log;
    two whole moments for the rest."""
    model = read_preset("llama-1b")
    h, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    square = 2 * h * 512 + 2 * 4 * 512 * h + 3 * 4
    mlp = 2 * h * 512 + 2 * 4 * 512 * f + 3 * 4
    rest = 2 * model.vocab_size * h + (2 * layers + 1) * h
    total = layers * (4 * square + 3 * mlp) + 2 * 4 * rest
    assert state_bytes("galore", "1b")["fp32"] == total / model.parameters


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_the_whole_model(name: str) -> None:
    """The command counts equal blocks once; here every block is there."""
    model = read_preset("llama-60m")
    llama = Llama(model, dtype=torch.bfloat16, device="meta", attention="cpu")
    recipe = METHODS[name].recipe(model.parameters) | {"lr": 0.0}
    for states, found in state_bytes(name, "60m").items():
        own = {} if states == "own" else {"states": states}
        settings = OptimizerConfig.model_validate({"method": name, **recipe, **own})
        optimizer = build_optimizer(
            settings,
            dict(llama.named_parameters()),
            llama.roles(),
            mode="unfused",
            seed=0,
            head_dim=model.head_dim,
        )
        hold_worst_window(optimizer)  # FRUGAL: other matrices take their turn
        total = sum(value.nbytes for _, value in optimizer.state_tensors())
        assert found == total / model.parameters


@pytest.mark.parametrize("name", METHODS)
def test_a_method_shows_its_parts_arguments_recipes_and_source(name: str) -> None:
    spec = METHODS[name]
    text = " ".join(shown(name).split())
    assert spec.summary.split(":")[0] in text
    assert f"Recipes ({spec.source})" in text
    assert all(f" {argument} " in text for argument in spec.arguments)
    for roles, parts in by_role(spec.build()).items():
        assert roles in text
        assert all(f" {part} " in text for part in parts if part != "form")
    for size, recipe in spec.recipes.items():
        assert f" {size} {recipe['lr']:g} " in text
    assert "Update modes: unfused" in text


def test_arguments_show_what_they_may_be() -> None:
    lines = [line.rstrip() for line in shown("galore").splitlines() if line.startswith("  ")]
    rows = {line.split()[0]: line for line in lines}
    assert rows["gap"].split(maxsplit=2)[1:] == ["200", "a whole number of at least 1"]
    assert '"iteration", "eigh" or "svd"' in rows["solver"]
    assert "[a number of at least 0 and below 1, a number of" in rows["betas"]
    assert rows["staggered"].split(maxsplit=2)[1:] == ["true", "true or false"]


@pytest.mark.parametrize(
    "name", [n for n, spec in METHODS.items() if {"alpha", "scale"} <= spec.arguments.keys()]
)
def test_alpha_and_scale_are_both_told(name: str) -> None:
    """APOLLO's papers and code name one factor in two ways: scale is alpha squared."""
    lines = shown(name).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  size"))
    head = lines[start].split()
    values = dict(zip(head, lines[start + 1].split(), strict=True))
    assert float(values["alpha"]) ** 2 == pytest.approx(float(values["scale"]), rel=1e-4)


def test_json_holds_the_same_for_programs() -> None:
    record = json.loads(shown("galore", "--json"))
    assert record["arguments"]["gap"] == 200
    assert record["composition"]["attention, mlp"]["projector"].startswith("SVD(rank=128")
    assert record["recipes"]["7b"] == {"lr": 0.005, "rank": 1024, "gap": 500, "scale": 0.25}
    assert record["updates"] == ["unfused", "fused+subspace", "fused", "layer-major"]
    assert record["source"] == "2403.03507"
    assert record["state_bytes_per_parameter"].keys() >= {"llama-60m", "llama-7b"}


def test_the_json_list_has_every_method_with_a_rank_or_without() -> None:
    records = json.loads(shown("--json"))
    assert [record["name"] for record in records["methods"]] == list(METHODS)
    assert records["unusable"] == []
    for record in records["methods"]:
        assert takes_rank(record["name"]) == ("rank" in record["arguments"])


def test_an_unknown_method_gets_the_nearest(capsys: Capture) -> None:
    assert run(["methods", "galor"]) == 2
    assert "did you mean `galore`?" in capsys.readouterr().err


def test_the_documentation_names_every_method() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    table = text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(METHODS)
