"""What docs/security.md promises: nothing is executed that was loaded, and no token is written."""

import ast
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowmem.cli.doctor_report import report
from lowmem.cli.main import run as command
from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError
from lowmem.model.huggingface import load_folder
from lowmem.private import without_private
from lowmem.tensorfile import stays_inside
from lowmem.train.checkpoint import verify
from lowmem.train.loop import train
from lowmem.train.run import Run

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for part in ("lowmem", "cli", "kernels") for path in (ROOT / part).rglob("*.py")
)
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXECUTES = {"eval", "exec", "compile", "__import__"}
TOKEN = "hf_aFakeTokenThatMustNotBeWritten01"


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def called(node: ast.AST) -> str:
    """The dotted name of a call: "torch.load", "eval"."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 100


def test_nothing_is_unpickled() -> None:
    wrong = []
    for place, node in trees():
        if isinstance(node, ast.Import):
            wrong += [place for one in node.names if one.name.partition(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in UNPICKLERS:
            wrong.append(place)
        if called(node) in ("torch.load", "torch.save") or "allow_pickle" in called(node):
            wrong.append(place)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            wrong.append(place)
    assert wrong == []


def test_nothing_that_was_read_is_executed() -> None:
    assert [place for place, node in trees() if called(node) in EXECUTES] == []


def test_code_of_the_hub_is_never_trusted() -> None:
    trusting = [
        place
        for place, node in trees()
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert trusting == []


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch exploded",))


@pytest.fixture
def trained(
    tiny_config: Callable[..., Config],
    tiny_corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "LOWMEM_NOTHING"):
        monkeypatch.setenv(name, TOKEN)
    train_as = {"updates": 2, "micro_batch": 8, "update": "unfused", "recompute": "keep"}
    config = tiny_config(
        optimizer={"method": "galore", "rank": 4, "lr": 0.01}, train=train_as | {"clip": "off"}
    )
    run = Run.create(config, None)
    train(run, tiny_corpus, lambda event: None)
    return run


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_run(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = trained.latest()
    for path in [*folder.rglob("*.safetensors"), folder / "state.json", folder / "manifest.json"]:
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        assert command(["eval", str(folder)]) == 5
        assert command(["resume", str(trained.folder)]) == 5
        path.write_bytes(whole)
    verify(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_token_is_in_no_file_of_a_run(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["resume", str(trained.folder)]) == 0
    assert command(["doctor", "--report", str(trained.folder)]) == 0
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    files = [path for path in trained.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_report_tells_no_folders_hosts_users_or_tokens(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "my-secret-machine")
    environ = {"USER": "johndoe", "LOWMEM_HOME": "/home/johndoe/cache", "HF_TOKEN": TOKEN}
    (trained.folder / "log").mkdir()
    (trained.folder / "log" / "error-1.txt").write_text(
        f'File "/home/johndoe/x/lowmem/train/loop.py"\nhost my-secret-machine {TOKEN}\n'
    )
    text = str(report(environ, trained.folder))
    for private in ("johndoe", "/home/", str(trained.folder.parent), "my-secret-machine", TOKEN):
        assert private not in text, private
    assert "loop.py" in text
    assert "galore" in text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/home/me/data/c4.jsonl is missing", ".../c4.jsonl is missing"),
        (r"C:\Users\me\x.txt", ".../x.txt"),
        ("0.95 and 1e-3, galore/adam", ".../adam"),
        (f"token {TOKEN}.", "token [secret]."),
    ],
)
def test_paths_keep_their_last_part(text: str, cleaned: str) -> None:
    assert cleaned in without_private(text, {})


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("state.json", True),
        ("model/model.safetensors", True),
        ("..", False),
        ("../x", False),
        ("model/../../x", False),
        ("/etc/passwd", False),
        ("//x", False),
        ("C:/x", False),
        ("a\\..\\x", False),
        ("a\0b", False),
        ("", False),
    ],
)
def test_names_of_a_manifest_stay_in_its_folder(name: str, inside: bool) -> None:
    assert stays_inside(name) == inside


def test_an_index_of_weights_cannot_leave_its_folder(trained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(trained.latest() / "model", folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "../outside.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_folder(folder, torch.float32, "cpu")
