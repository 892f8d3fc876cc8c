"""Methods of other packages: they train like ours, and broken ones disturb nobody."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowmem.cli.main import run
from lowmem.errors import ConfigError
from lowmem.optim.methods import METHODS, build_method, method_names, method_spec, third_party

ROOT = Path(__file__).parents[3]
Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """offer("package", "name = module:object", "source of the module"): as if it were installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, entry: str, source: str | None = None) -> None:
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[lowmem.methods]\n{entry}\n")
        if source is not None:
            (tmp_path / f"{package}_module.py").write_text(source)
        third_party.installed.cache_clear()

    third_party.installed.cache_clear()
    yield install
    third_party.installed.cache_clear()
    third_party.load.cache_clear()
    for name in [name for name in sys.modules if name.endswith("_module")]:
        del sys.modules[name]


SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 64,
}
GOOD = """
from lowmem.optim.methods import adamw
from lowmem.optim.methods.spec import MethodSpec

def plain(*, eps: float = 1e-8):
    '''Plain: as AdamW.'''
    return adamw.adamw(eps=eps)

SPEC = MethodSpec(plain, {"any": {"lr": 0.5, "eps": 0.25}}, "nowhere")
"""


def example(language: str) -> str:
    """The block of docs/methods.md in that language."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which the example of the documentation is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(example("toml"))
    (source / "low_rank_adagrad.py").write_text(example("python"))
    command = [sys.executable, "-m", "pip", "install", str(source), "--target", str(target)]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, *offline], check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}


def test_the_documented_example_trains(
    environment: dict[str, str], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("three words repeated " * 3000)
    (tmp_path / "model.json").write_text(json.dumps(SHAPE))
    settings = ["--data", "text.txt", "--model", "model.json", "--seq-len", "16", "--batch", "2seq"]
    settings += ["--tokenizer", str(tiny_tokenizer), "--eval-every", "0", "--save-every", "0"]
    words = ["--method", "low_rank_adagrad", "--updates", "5", "--device", "cpu", "--name", "a"]
    command = [sys.executable, "-m", "lowmem", "train", *settings, *words, "--gap", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Adagrad(eps=1e-08" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    config = (tmp_path / "runs/a/config.toml").read_text()
    assert "gap = 2" in config
    assert "rank = 8" in config  # the sheet's 128 of 512, at a hidden size of 32


def test_the_documented_example_is_shown(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "lowmem", "methods", "low_rank_adagrad"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Adagrad in the leading singular subspace" in shown.stdout
    assert "Recipes (no experiment yet)" in shown.stdout


def test_the_list_has_methods_of_other_packages(
    offer: Offer, capsys: pytest.CaptureFixture[str]
) -> None:
    offer("polite", "plain = polite_module:SPEC", GOOD)
    assert run(["methods"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("plain ")


def test_a_package_is_imported_only_when_its_method_is_used(offer: Offer) -> None:
    offer("polite", "plain = polite_module:SPEC", GOOD)
    assert method_names() == [*METHODS, "plain"]
    assert "polite_module" not in sys.modules
    assert method_spec("plain").recipe(1) == {"lr": 0.5, "eps": 0.25}
    assert build_method("plain", {"eps": 0.5}) == build_method("adamw", {"eps": 0.5})


def test_a_foreign_method_appears_in_hints(offer: Offer) -> None:
    offer("polite", "plain = polite_module:SPEC", GOOD)
    with pytest.raises(ConfigError, match="'plane' is unknown") as caught:
        method_spec("plane")
    assert caught.value.fix == "did you mean `plain`?"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "has no attribute 'SPEC'"),
        ("SPEC = 3", "it is of type int, not a MethodSpec"),
        (GOOD.replace("*, eps", "eps"), "argument eps of its builder is not keyword-only"),
        (GOOD.replace("adamw.adamw(eps=eps)", "1 / 0"), "ZeroDivisionError: division by zero"),
        (GOOD.replace("adamw.adamw(eps=eps)", "None"), "its builder returns NoneType, not ByRole"),
        (GOOD.replace("eps: float", "eps: 'Missing'"), "Missing"),
    ],
)
def test_a_broken_package_is_told_when_used_and_in_the_list(
    offer: Offer, source: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    offer("broken", "odd = broken_module:SPEC", source)
    with pytest.raises(ConfigError, match="method 'odd' of broken") as caught:
        method_spec("odd")
    assert caught.value.what == "method 'odd' of broken 1.0 cannot be used"
    assert reason in caught.value.why
    assert run(["methods"]) == 0  # everything else is there
    shown = capsys.readouterr().out
    assert "method 'odd' of broken 1.0 cannot be used" in shown
    assert "galore" in shown
    assert run(["methods", "galore"]) == 0


def test_our_own_names_cannot_be_taken(offer: Offer, capsys: pytest.CaptureFixture[str]) -> None:
    offer("greedy", "galore = greedy_module:SPEC", GOOD)
    assert method_spec("galore") is METHODS["galore"]
    assert method_names() == list(METHODS)
    assert run(["methods"]) == 0
    line = "method 'galore' of greedy 1.0 is refused: galore is a method of lowmem itself"
    assert line in capsys.readouterr().out
    assert run(["plan", "--model", "llama-9m", "--gpu", "8GB", "--method", "galore"]) == 0
    said = "method galore: lowmem's own; the one of greedy 1.0 is refused"
    assert said in capsys.readouterr().out


def test_two_packages_with_one_name_are_both_refused(offer: Offer) -> None:
    offer("first", "plain = first_module:SPEC", GOOD)
    offer("second", "plain = second_module:SPEC", GOOD)
    assert "plain" not in method_names()
    with pytest.raises(ConfigError, match="'plain' is ambiguous") as caught:
        method_spec("plain")
    assert caught.value.why == "offered by first 1.0, second 1.0"
