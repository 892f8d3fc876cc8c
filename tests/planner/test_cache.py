"""Plans that are kept: found again as they were, and never after anything has changed."""

import json
import os
import re
import shutil
from dataclasses import fields, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.schema import Config
from lowmem.optim.methods.third_party import GROUP
from lowmem.planner import cache
from lowmem.planner.cache import VARIABLES, digest_of, keep_plan, kept_plan, plan_key
from lowmem.planner.plan import Card, Rates
from tests.planner.test_plan import CARD, PLAN

PACKAGE = Path(cache.__file__).parents[1]
CONFIG = Config.model_validate({"model": "llama-9m", "train": {"updates": 5}})
NOTES = ["seq-len 256: the papers' C4 protocol"]
KEY = "0" * 64


def key(
    config: Config = CONFIG,
    card: Card = CARD,
    notes: list[str] = NOTES,
    variables: dict[str, str] | None = None,
) -> str:
    return plan_key(config, card, notes, variables or {})


def changed(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, "x")
        case Rates():
            return replace(value, tflops=value.tflops + 1)
        case None:
            return "x"
    raise AssertionError(value)


def test_the_same_question_has_the_same_key() -> None:
    assert key() == key()
    assert re.fullmatch("[0-9a-f]{64}", key())


@pytest.mark.parametrize("name", [field.name for field in fields(Card)])
def test_every_field_of_the_card_counts(name: str) -> None:
    assert key(card=replace(CARD, **{name: changed(getattr(CARD, name))})) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"updates": 6}},
        {"train": {"seed": 1}},
        {"model": "llama-20m"},
        {"optimizer": {"rank": 8}},
        {"optimizer": {"gap": 100}},
        {"data": {"seq_len": 128}},
        {"run": {"name": "a"}},
    ],
)
def test_every_setting_counts(change: dict[str, Any]) -> None:
    given = CONFIG.model_dump()
    for section, value in change.items():
        given[section] = given[section] | value if isinstance(value, dict) else value
    assert key(Config.model_validate(given)) != key()


def test_notes_count() -> None:
    assert key(notes=[]) != key()


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_that_shape_memory_count(name: str) -> None:
    assert len({key(variables=given) for given in ({}, {name: "a"}, {name: "b"})}) == 3


def test_no_source_that_plans_reads_another_variable() -> None:
    """What a plan may depend on is in the key; elsewhere variables only choose folders."""
    read = set()
    for part in ("kernels", "model", "optim", "planner"):
        for path in (PACKAGE / part).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            found = re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', text)
            assert len(found) == len(re.findall(r"os\.environ(?:\.get|\[)", text)), path
            read |= set(found)
    assert read <= set(VARIABLES)


def test_the_content_of_a_model_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = Config(model=str(path))
    keys = set()
    for hidden in (64, 128):
        shape = {"hidden_size": hidden, "intermediate_size": 172, "num_attention_heads": 4}
        path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, **shape}))
        keys.add(key(config))
    assert len(keys) == 2


@pytest.mark.parametrize("package", cache.PACKAGES)
def test_versions_count(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = key(), cache.version
    newer = {package: "99"}
    monkeypatch.setattr(cache, "version", lambda name: newer.get(name) or version(name))
    assert key() != before


def test_python_and_the_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key()}
    for name in ("python_version", "machine"):
        monkeypatch.setattr(cache.platform, name, lambda: "another")
        keys.add(key())
    assert len(keys) == 3


def test_methods_of_other_packages_count_with_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.METHODS_GROUP == GROUP
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_methods").mkdir()
    source = tmp_path / "foreign_methods" / "__init__.py"
    source.write_text("raise ImportError('listing imports nothing')")
    keys = {key()}
    entries: list[EntryPoint] = []
    monkeypatch.setattr(cache, "entry_points", lambda group: entries)
    for value in ("foreign_methods:ONE", "foreign_methods:TWO"):
        entries[:] = [EntryPoint("sign", value, GROUP)]
        keys.add(key())
    source.write_text("raise ImportError('another version')")
    keys.add(key())
    assert len(keys) == 4


def test_sources_count_by_content_and_place(tmp_path: Path) -> None:
    """Also those behind links, as cli, kernels and configs are, and within a tick of the clock."""
    for name in ("a/one.py", "linked/two.py", "linked/table.toml"):
        path = tmp_path / "real" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
    package = tmp_path / "package"
    package.mkdir()
    for name in ("a", "linked"):
        (package / name).symlink_to(tmp_path / "real" / name)
    digests = [digest_of(package)]
    for name in ("a/one.py", "linked/two.py", "linked/table.toml"):
        path = package / name
        before = path.stat()
        path.write_text("x = 2")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        digests.append(digest_of(package))
    (package / "a" / "one.py").rename(package / "a" / "three.py")
    digests.append(digest_of(package))
    (package / "a" / "more.py").write_text("")
    digests.append(digest_of(package))
    assert len(set(digests)) == len(digests)
    (package / "a" / "cached.pyc").write_text("no source")
    assert digest_of(package) == digests[-1]


def test_editing_any_part_of_lowmem_changes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "lowmem"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_PACKAGE", copy)
    keys = [key()]
    for name in ("cli/plan.py", "kernels/adam.py", "configs/cards.toml", "planner/job.py"):
        with (copy / name).open("a") as file:
            file.write("# edited\n")
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_plan_is_found_as_it_was(tmp_path: Path) -> None:
    assert kept_plan(tmp_path / "plans", KEY) is None
    keep_plan(tmp_path / "plans", KEY, PLAN)
    assert kept_plan(tmp_path / "plans", KEY) == PLAN
    assert kept_plan(tmp_path / "plans", "1" * 64) is None


def test_a_damaged_file_is_no_plan_and_is_written_anew(tmp_path: Path) -> None:
    keep_plan(tmp_path, KEY, PLAN)
    path = tmp_path / f"{KEY}.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        path.write_bytes(whole[:at])
        assert kept_plan(tmp_path, KEY) is None
        flipped = bytearray(whole)
        flipped[at] ^= 1  # a digit becomes another digit
        path.write_bytes(flipped)
        assert kept_plan(tmp_path, KEY) in (None, PLAN)
    for junk in (b"", b"null", b"[]", b"{}", b'{"sha256": 1, "plan": 2}', b"[" * 100_000, b"\xff"):
        path.write_bytes(junk)
        assert kept_plan(tmp_path, KEY) is None
    keep_plan(tmp_path, KEY, PLAN)
    assert kept_plan(tmp_path, KEY) == PLAN


def test_a_plan_for_another_question_is_none_for_this_one(tmp_path: Path) -> None:
    keep_plan(tmp_path, KEY, PLAN)
    other = "1" * 64
    (tmp_path / f"{KEY}.json").rename(tmp_path / f"{other}.json")
    assert kept_plan(tmp_path, other) is None


def test_another_version_of_the_form_is_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_plan(tmp_path, KEY, PLAN)
    path = tmp_path / f"{KEY}.json"
    record = json.loads(path.read_text())["plan"] | {"schema_version": 1}
    path.write_text(json.dumps({"sha256": cache._seal(KEY, record), "plan": record}))
    assert kept_plan(tmp_path, KEY) is None


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST", 3)
    for number in range(5):
        keep_plan(tmp_path, str(number), PLAN)
        os.utime(tmp_path / f"{number}.json", (number, number))
    keep_plan(tmp_path, "5", PLAN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3.json", "4.json", "5.json"]
