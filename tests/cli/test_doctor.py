"""`lowmem doctor`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.cli import bench_optimizer, doctor, doctor_disk, doctor_resume, kernels
from lowmem.cli.bench_optimizer import Contender, Row, compared
from lowmem.cli.bench_peers import PEERS
from lowmem.cli.doctor_resume import METHODS, trial
from lowmem.cli.main import run
from lowmem.data.shards import Corpus
from lowmem.train.run import Run


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


@pytest.mark.parametrize(
    "arguments", [["--resume", "--disk"], ["--disk", "--report"], ["runs/a"], ["--kills", "0"]]
)
def test_contradicting_examinations_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", *arguments]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_disk_is_measured_and_set_against_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_disk, "_WRITTEN", 2**24)
    file = tmp_path / "run.toml"
    file.write_text(
        '[optimizer]\nstates = "fp32"\n[train]\ndevice = "cpu"\nupdate = "unfused"\n'
        'recompute = "keep"\nbatch = "2seq"\nmicro_batch = 2\n'
    )
    flags = ["--out", str(tmp_path / "runs"), "--model", "llama-tiny", "--method", "adamw"]
    assert run(["doctor", "--disk", "--config", str(file), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disk"]["bytes_per_second"] > 0
    assert found["need"]["fits"] is True
    assert found["need"]["together"] == 4 * found["need"]["checkpoint"] > 0
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kills", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_killed_runs_continue_bit_for_bit(kills: int, tiny_corpus: Corpus, tmp_path: Path) -> None:
    methods = list(METHODS.items())
    for name, sections in methods[: 1 if kills == 1 else None]:
        found = trial(name, sections, kills, tmp_path, tiny_corpus)
        assert found.passed, found
        assert found.kills == kills
        assert found.losses > 8 * kills


def test_a_trial_sees_a_run_that_continued_differently(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, loss in ((whole, "1.0"), (broken, "1.5")):
        step = folder / "checkpoints" / "step-000002"
        step.mkdir(parents=True)
        (folder / "config.toml").write_text("")
        (folder / "latest").write_text("step-000002\n")
        (folder / "metrics.jsonl").write_text(f'{{"update": 0, "loss": {loss}}}\n')
        (step / "state.json").write_text(loss)
        (step / "manifest.json").write_text("{}")
    found = doctor_resume.Trial("x")
    doctor_resume.compare(Run.open(whole), Run.open(broken), found)
    assert (found.differing_losses, found.differing_files) == (1, 1)
    assert not found.passed


@pytest.fixture
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ELEMENTS", 700)
    monkeypatch.setattr(kernels, "_INTERPRETED", 300)
    monkeypatch.setattr(kernels, "_BENCH_ELEMENTS", {"cpu": 700, "cuda": 700})


def kernel_rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["kernels"]
    return found


def test_every_kernel_is_examined_and_timed(
    few_elements: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowmem.kernels.examples import EXAMPLES

    assert run(["doctor", "--kernels", "--json"]) == 0
    rows = kernel_rows(capsys)
    assert {row["operator"] for row in rows} == {each.kernel.name for each in EXAMPLES}
    assert all(row["state"] in ("ok", "note") for row in rows)
    assert all((row["seconds"] is None) == ("interpreted" in row["implementation"]) for row in rows)
    assert run(["doctor", "--kernels"]) == 0
    assert "as the reference" in capsys.readouterr().out


def test_a_kernel_with_wrong_numbers_exits_with_eight(
    few_elements: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowmem.kernels import native

    if native.library() is None:
        pytest.skip("needs a C++ compiler")
    right = native.call

    def wrong(name: str, arguments: tuple[Any, ...]) -> None:
        right(name, arguments)
        if name == "blockwise_quantize":
            arguments[3][5] += 1

    monkeypatch.setattr(native, "call", wrong)
    assert run(["doctor", "--kernels", "--json"]) == 8
    captured = capsys.readouterr()
    states = {
        (row["operator"], row["implementation"]): (row["state"], row["text"])
        for row in json.loads(captured.out)["kernels"]
    }
    state, text = states["blockwise_quantize", "C++"]
    assert state == "broken"
    assert text.startswith("1 of 700")
    assert "LOWMEM_KERNELS=reference" in captured.err


def test_the_forced_reference_is_named(
    few_elements: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_KERNELS", "reference")
    assert run(["doctor", "--kernels", "--json"]) == 0
    here = [row for row in kernel_rows(capsys) if "interpreted" not in row["implementation"]]
    assert {row["text"] for row in here} == {"LOWMEM_KERNELS=reference"}


def test_a_choice_that_does_not_exist_exits_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_KERNELS", "trition")
    assert run(["doctor", "--kernels"]) == 2
    assert "auto, reference, triton" in capsys.readouterr().err


def test_kernels_are_timed_beside_a_copy(
    few_elements: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowmem.kernels import measure

    monkeypatch.setattr(measure, "_COPIED_ON_CPU", 2**20)
    assert run(["bench", "kernels", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["copy"] > 0
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in record["kernels"])
    products = record["int8_products"]
    assert {row["product"] for row in products} == {"x W'", "grad W"}
    assert all(row["slices"] > 0 and row["floats"] > 0 for row in products)
    assert record["device"] != "cpu" or all(row["int8"] > 0 and row["fp8"] > 0 for row in products)
    assert all((row["codes"] is None) == (record["device"] == "cpu") for row in products)
    assert run(["bench", "kernels"]) == 0
    out = capsys.readouterr().out
    assert "adam8" in out
    assert "by slices" in out


@pytest.mark.parametrize(
    ("codes", "tokens"), [((1, 1, 1), 64), ((1, 3, 1), 1), ((3, 1, 1), 0), ((1, 1, None), 16)]
)
def test_codes_are_faster_up_to_the_first_tokens_at_which_they_are_not(
    codes: tuple[float | None, ...], tokens: int
) -> None:
    from lowmem.cli.bench_products import ProductTimes, faster_up_to

    sizes = zip((1, 16, 64), codes, strict=True)
    rows = [ProductTimes("x W'", count, seconds, 2.0, 1.0) for count, seconds in sizes]
    assert (
        faster_up_to([*rows, *(ProductTimes("grad W", n, 1, 2, 1) for n in (1, 16, 64))]) == tokens
    )


def test_a_step_is_compared_with_the_package_of_its_own_method() -> None:
    def made(name: str, method: str, seconds: float | None, ours: bool = False) -> tuple[Any, Row]:
        return Contender(name, lambda *_: None, method, ours), Row(name, seconds)  # type: ignore

    found = compared(
        [
            made("torch", "adamw", 2.0),
            made("ours", "adamw", 3.0, ours=True),
            made("ours", "galore", 1.0, ours=True),
            made("package", "galore", 4.0),
            made("ours", "fira", 1.0, ours=True),
            made("not installed", "fira", None),
            made("ours", "cosmos", 1.0, ours=True),
        ]
    )
    assert [row.of_peer for _, row in found] == [None, 1.5, 0.25, None, None, None, None]


@pytest.mark.slow  # half a minute, of which bitsandbytes takes most
def test_a_step_is_timed_beside_those_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowmem.kernels import measure

    gone = replace(PEERS[1], module="no_such_package")
    monkeypatch.setattr(bench_optimizer, "PEERS", (PEERS[0], gone))
    monkeypatch.setattr(measure, "_COPIED_ON_CPU", 2**20)
    assert run(["bench", "optimizer", "--model", "llama-tiny", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    rows = {row["optimizer"]: row for row in record["steps"]}
    assert record["model"] == "llama-tiny"
    assert rows["torch AdamW, fused"]["ratio"] == 1.0
    ours, theirs = rows["lowmem adam8bit"], rows["bitsandbytes AdamW8bit"]
    assert ours["of_peer"] == pytest.approx(ours["seconds"] / theirs["seconds"])
    missing = rows["galore-torch GaLoreAdamW"]
    assert missing["missing"] == "not installed: pip install galore-torch"
    assert missing["seconds"] is rows["lowmem galore"]["of_peer"] is None
    # Both moments in 8 bits are read and written instead of 4 bytes each.
    assert rows["lowmem adam8bit"]["bytes"] < 0.7 * rows["lowmem adamw"]["bytes"]
