"""Checkpoints: whole or absent, the right ones kept, and every byte of them accounted for."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus
from lowmem.errors import CheckpointError
from lowmem.model.llama import Llama
from lowmem.optim.optimizer import Optimizer
from lowmem.tensorfile import read_tensors
from lowmem.train.build import build
from lowmem.train.checkpoint import export, restore, save, signed, tidy, verify
from lowmem.train.run import Run
from lowmem.train.snapshot import Position


@dataclass
class Parts:
    """A run with a model and an optimizer that have never been trained; saving needs no more."""

    run: Run
    model: Llama
    optimizer: Optimizer
    batches: Batches
    corpus: Corpus

    def save(self, update: int) -> Path:
        at = Position(update, 256 * update)
        return save(self.run, self.model, self.optimizer, self.batches, self.corpus, at)

    def steps(self) -> list[str]:
        return sorted(path.name for path in (self.run.folder / "checkpoints").iterdir())


@pytest.fixture
def make(ready_config: Callable[..., Config], tiny_corpus: Corpus) -> Callable[..., Parts]:
    def parts(**sections: Any) -> Parts:
        run = Run.create(ready_config(**sections), None)
        model, optimizer = build(run.config)
        model.initialise(run.config.train.seed)
        assert tiny_corpus.train is not None
        batches = Batches(tiny_corpus.train, seq_len=32, rows_per_update=8, seed=0)
        return Parts(run, model, optimizer, batches, tiny_corpus)

    return parts


@pytest.fixture
def parts(make: Callable[..., Parts]) -> Parts:
    return make()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_checkpoint_holds_weights_states_and_position(parts: Parts) -> None:
    parts.optimizer.updates = 3
    folder = parts.save(3)
    assert folder == parts.run.folder / "checkpoints" / "step-000003" == parts.run.latest()
    assert (parts.run.folder / "latest").read_text() == "step-000003\n"
    weights = dict(read_tensors(folder / "model" / "model.safetensors"))
    assert weights.keys() == dict(parts.model.named_parameters()).keys()
    states = dict(read_tensors(folder / "optimizer" / "state.safetensors"))
    own = dict(parts.optimizer.state_tensors())
    assert states.keys() == own.keys()
    assert "model.layers.0.mlp.down_proj.weight/basis" in states
    assert all(torch.equal(states[key], own[key]) for key in own)
    state = json.loads((folder / "state.json").read_text())
    assert (state["update"], state["tokens"], state["optimizer_updates"]) == (3, 768, 3)
    assert state["numbers"] == parts.optimizer.state_numbers()
    assert state["next_batch"] == parts.batches.of(3).digest()
    about = json.loads((folder / "model" / "lowmem.json").read_text())
    assert (about["update"], about["data"]["seq_len"]) == (3, 32)


def test_the_manifest_covers_every_file(parts: Parts) -> None:
    folder = parts.save(1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    assert files == {
        name: {
            "size": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for name, path in found.items()
        if path.is_file() and name != "manifest.json"
    }
    assert {"state.json", "optimizer/state.safetensors", "model/tokenizer.json"} <= files.keys()


def test_restoring_gives_position_and_states_back(parts: Parts, make: Callable[..., Parts]) -> None:
    parts.optimizer.updates = 5
    for _, value in parts.optimizer.state_tensors():
        value.copy_(torch.arange(value.numel()).view(value.shape))
    folder = parts.save(5)
    other = make(run={"out": str(parts.run.folder.parent), "name": "b"})
    for parameter in other.model.parameters():
        parameter.data.zero_()
    at, _ = restore(folder, other.model, other.optimizer, other.batches, other.corpus)
    assert at == Position(5, 5 * 256)
    assert other.optimizer.updates == 5
    mine, theirs = parts.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    states = dict(other.optimizer.state_tensors())
    assert all(torch.equal(value, states[key]) for key, value in parts.optimizer.state_tensors())


def test_the_next_save_clears_what_a_killed_one_left(parts: Parts) -> None:
    parts.save(1)
    left = parts.run.checkpoints / ".tmp-step-000002"
    (left / "model").mkdir(parents=True)
    (left / "model" / "stale").write_text("of the killed save")
    folder = parts.save(2)
    assert parts.steps() == ["step-000001", "step-000002"]
    assert not (folder / "model" / "stale").exists()
    verify(folder)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1, ["step-000010"]), (2, ["step-000008", "step-000010"]), (9, None)],
)
def test_the_newest_are_kept(keep: int, left: list[str] | None, make: Callable[..., Parts]) -> None:
    parts = make(checkpoint={"keep": keep})
    updates = [2, 4, 6, 8, 10]
    for update in updates:
        parts.save(update)
    assert parts.steps() == (left or [f"step-{update:06d}" for update in updates])


def test_saving_an_earlier_update_keeps_those_that_come_after(make: Callable[..., Parts]) -> None:
    """A run that was continued from an earlier checkpoint: its old future is not its to remove."""
    parts = make(checkpoint={"keep": 2})
    for update in (2, 8, 10, 4):
        parts.save(update)
    assert parts.steps() == ["step-000004", "step-000008", "step-000010"]
    assert parts.run.latest().name == "step-000004"


def test_saving_an_update_again_replaces_it(parts: Parts) -> None:
    parts.save(1)
    parts.model.get_parameter("lm_head.weight").data.fill_(7.0)
    folder = parts.save(1)
    weights = dict(read_tensors(folder / "model" / "model.safetensors"))
    assert (weights["lm_head.weight"] == 7.0).all()
    assert parts.steps() == ["step-000001"]
    verify(folder)


FILES = [
    "state.json",
    "optimizer/state.safetensors",
    "model/model.safetensors",
    "model/config.json",
    "model/tokenizer.json",
    "model/lowmem.json",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "short", "long", "changed"])
def test_damage_is_found_and_named(damage: str, file: str, parts: Parts) -> None:
    parts.save(1)
    folder = parts.save(2)
    verify(folder)
    path = folder / file
    content = path.read_bytes()
    told = {
        "missing": f"{path} is missing",
        "short": f"{path} has {len(content) - 1} bytes instead of {len(content)}",
        "long": f"{path} has {len(content) + 1} bytes instead of {len(content)}",
        "changed": f"{path} is damaged: its sha256 is not that of the manifest",
    }[damage]
    if damage == "missing":
        path.unlink()
    else:
        changed = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"short": content[:-1], "long": content + b" "}.get(damage, changed))
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert caught.value.what == told
    assert f"lowmem resume {folder.parent / 'step-000001'}" in caught.value.fix


def test_the_newest_of_the_others_is_proposed(make: Callable[..., Parts]) -> None:
    parts = make(checkpoint={"keep": 3})
    for update in (1, 2):
        parts.save(update)
    folder = parts.save(3)
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert str(folder.parent / "step-000002") in caught.value.fix


def test_a_damaged_checkpoint_without_another_says_what_is_left_to_do(parts: Parts) -> None:
    folder = parts.save(1)
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert caught.value.fix == "restore the file from a copy"


@pytest.mark.parametrize("text", [None, "", "{", "[]"])
def test_an_unreadable_manifest_is_told(text: str | None, parts: Parts) -> None:
    path = parts.save(1) / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json (cannot be read|is no JSON object)"):
        verify(path.parent)


def test_a_manifest_without_weights_is_refused(parts: Parts) -> None:
    path = parts.save(1) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["model/model.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor lowmem-int8"):
        verify(path.parent)


def test_a_damaged_checkpoint_changes_nothing_when_it_is_restored(parts: Parts) -> None:
    folder = parts.save(1)
    (folder / "optimizer" / "state.safetensors").unlink()
    parts.model.get_parameter("lm_head.weight").data.fill_(7.0)
    with pytest.raises(CheckpointError):
        restore(folder, parts.model, parts.optimizer, parts.batches, parts.corpus)
    assert (parts.model.get_parameter("lm_head.weight") == 7.0).all()


def test_a_checkpoint_of_a_newer_schema_is_refused(parts: Parts) -> None:
    folder = parts.save(1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"schema_version": 2, "lowmem": "9.0"}))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "state.json").read_bytes()
    manifest["files"]["state.json"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(CheckpointError, match="has schema version 2") as caught:
        restore(folder, parts.model, parts.optimizer, parts.batches, parts.corpus)
    assert caught.value.fix == "use lowmem 9.0"


def test_export_gives_the_model_folder_of_a_run_or_checkpoint(parts: Parts, tmp_path: Path) -> None:
    parts.save(1)
    older = contents(parts.run.latest() / "model")
    parts.model.get_parameter("lm_head.weight").data.fill_(7.0)
    newest = parts.save(2)
    for source, expected in [
        (parts.run.folder, newest / "model"),
        (newest.with_name("step-000001"), newest.with_name("step-000001") / "model"),
        (newest / "model", newest / "model"),
    ]:
        out = tmp_path / "out"
        export(source, out)
        exported = {Path(path).name: content for path, content in contents(out).items()}
        assert exported == {Path(path).name: data for path, data in contents(expected).items()}
        shutil.rmtree(out)
    assert contents(newest.with_name("step-000001") / "model") == older


def test_a_damaged_checkpoint_is_not_exported(parts: Parts, tmp_path: Path) -> None:
    folder = parts.save(1)
    (folder / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json has 2 bytes"):
        export(parts.run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_replacement_was_cut_is_found_and_gets_its_name_back(
    parts: Parts,
) -> None:
    """A run that is continued from an earlier checkpoint comes by the same names again."""
    final = parts.save(4)
    aside = final.rename(final.with_name(".tmp-old-step-000004"))
    assert parts.run.latest() == aside
    verify(parts.run.latest())
    tidy(parts.run)
    assert parts.run.latest() == final
    verify(final)


@pytest.mark.parametrize("name", ["../../other", "/etc/passwd", "model/../../x", "C:\\x", ""])
def test_a_manifest_cannot_name_files_outside_its_folder(name: str, parts: Parts) -> None:
    folder = parts.save(4)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        verify(folder)


@pytest.mark.parametrize(
    "content", [b"../../elsewhere", b"..", b"/etc", b"step-000004/model", b"\xff\xfe", b"\0", b""]
)
def test_a_pointer_cannot_leave_the_folder(content: bytes, parts: Parts) -> None:
    folder = parts.save(4)
    (parts.run.folder / "latest").write_bytes(content)
    assert parts.run.latest() == folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("update", -1),
        ("update", 2**70),
        ("update", True),
        ("tokens", "3"),
        ("optimizer_updates", None),
        ("numbers", []),
        ("numbers", {"a": {"b": "c"}}),
        ("numbers", {"a": 3}),
        ("corpus", 3),
        ("next_batch", None),
        ("carried", []),
        ("carried", {"guard": {}}),
        ("carried", {"best": {"update": "3", "loss": 1.0}}),
    ],
)
def test_a_state_that_lowmem_never_writes_is_refused(key: str, value: Any, parts: Parts) -> None:
    """The manifest vouches for it: somebody has made it agree."""
    folder = parts.save(4)
    state = json.loads((folder / "state.json").read_text()) | {key: value}
    (folder / "state.json").write_text(json.dumps(state))
    content = (folder / "state.json").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"]["state.json"] = {"size": len(content), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    verify(folder)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        restore(folder, parts.model, parts.optimizer, parts.batches, parts.corpus)


@pytest.mark.parametrize("content", ["{}", '{"files": {"state.json": {}}}', '{"files": []}'])
def test_a_manifest_that_does_not_cover_the_checkpoint_is_refused(
    content: str, parts: Parts
) -> None:
    folder = parts.save(4)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest.json does not"):
        verify(folder)


def test_step_numbers_are_compared_as_numbers(make: Callable[..., Parts]) -> None:
    parts = make(checkpoint={"keep": 1}, guard={"rollbacks": 0})
    parts.save(999_999)
    parts.save(1_000_000)
    assert parts.steps() == ["step-1000000"]
