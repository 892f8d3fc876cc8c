"""Sweeps as users type them; trials train in one slow test, elsewhere they only leave a run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from lowmem.cli import sweep as module
from lowmem.cli.main import run
from lowmem.cli.sweep_forecast import Forecast, forecast_of
from lowmem.cli.sweep_process import _without_settings
from lowmem.config.defaults import settle
from lowmem.config.load import load
from lowmem.config.schema import settled
from lowmem.train.events import Evaluated, Finished
from lowmem.train.run import EVENTS, METRICS, Run
from tests.analysis.conftest import append, trained

ROOT = Path(__file__).parents[2]
SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 320,
}
SETTINGS = [
    *("--model", "small.json", "--data", "text.txt", "--tokenizer", "tokenizer"),
    *("--seq-len", "16", "--batch", "4seq", "--device", "cpu", "--updates", "3"),
    *("--eval-tokens", "200"),
]
RATES = ["sweep", *SETTINGS, "--name", "rates", "--method", "adamw"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text, a tokenizer and a model."""
    text = " ".join(f"word{i % 7} number {i * i % 101}" for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=300, special_tokens=["</s>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "small.json").write_text(json.dumps(SHAPE))
    for name in [name for name in os.environ if name.startswith("LOWMEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of all trials; none trains, each leaves what training would leave.

    A rate above 1 diverges, and a smaller one is better, so that the best is known.
    """
    commands: list[list[str]] = []

    def pretend(arguments: Sequence[str], log: Path, stop: Any) -> int:
        commands.append(list(arguments))
        if arguments[0] == "resume":
            return 75
        if not Path("text.txt").exists():
            log.write_text("error: text.txt does not exist (exit 4)\n  fix: none\n")
            return 4
        config = load({}, [Path(arguments[-1])], {}).config
        lr = 0.01 if config.optimizer.lr == "auto" else settled(config.optimizer.lr)
        optimizer = config.optimizer.model_copy(update={"lr": lr})
        config = config.model_copy(update={"optimizer": optimizer})
        made = Run.create(settle(config, cuda=False)[0], None)
        append(made.folder / METRICS, [trained(2, lr), Evaluated(2, lr, 200, 0.1)])
        if lr > 1:
            log.write_text("error: update 3: loss nan (exit 6)\n")
            return 6
        append(made.folder / EVENTS, [Finished(3, lr, 6.5, 384, 1.5, "checkpoint")])
        return 0

    def forecasts(configs: Sequence[Any]) -> Iterator[Forecast]:
        for config in configs:
            large = config.optimizer.method == "galore"
            yield Forecast(2**20, 30.0, refused="too large" if large else "")

    monkeypatch.setattr(module, "run_trial", pretend)
    monkeypatch.setattr(module, "forecasts", forecasts)
    return commands


def states(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Trial -> where it stands, by --json; the exit code is ignored."""
    capsys.readouterr()
    run([*arguments, "--json"])
    return {t["name"]: t["state"] for t in json.loads(capsys.readouterr().out)["trials"]}


def test_a_sweep_runs_every_trial_once_and_names_the_best(
    started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    lrs = ["--lr", "0.001,0.03"]
    assert run([*RATES, *lrs, "--seeds", "2"]) == 0
    out, err = capsys.readouterr()
    assert "best method adamw, lr 0.001: perplexity 1.001" in out
    assert "4 trials to run, 2.0 min" in err
    names = [f"adamw-lr{lr}-seed{seed}" for lr in ("0.001", "0.03") for seed in (0, 1)]
    assert sorted(path.name for path in Path("runs/rates").glob("adamw-*")) == names
    assert [command[0] for command in started] == ["train"] * 4

    started.clear()
    assert run([*RATES, *lrs, "--seeds", "2"]) == 0
    assert started == []  # what is finished is not repeated
    assert capsys.readouterr().out == out

    assert states(capsys, *RATES, *lrs, "--seeds", "3") == {
        f"adamw-lr{lr}-seed{seed}": "finished" for lr in ("0.001", "0.03") for seed in (0, 1, 2)
    }
    assert len(started) == 2  # a sweep may grow


def test_a_single_trial_says_that_nothing_is_varied(
    started: list[list[str]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("one.toml").write_text('[settings]\noptimizer.method = "adamw"\n')
    assert run(["sweep", "one.toml", *SETTINGS]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "runs/one: 1 trial, for nothing is varied: no setting and no seed"
    assert any(line.startswith("1 trial to run") for line in told)
    assert len(started) == 1
    assert run(["sweep", "one.toml", *SETTINGS, "--seeds", "2"]) == 0  # it grows
    assert "varied" not in capsys.readouterr().err


def test_a_failed_trial_is_named_and_the_rest_goes_on(
    started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    lrs = ["--lr", "1e30,0.01"]
    assert run([*RATES, *lrs]) == 0
    err = capsys.readouterr().err
    assert "diverged: adamw-lr1e30-seed0: update 3: loss nan" in err
    assert len(started) == 2
    started.clear()
    found = states(capsys, *RATES, *lrs)
    assert found == {"adamw-lr1e30-seed0": "diverged", "adamw-lr0.01-seed0": "finished"}
    assert started == []  # it would diverge again, bit for bit


def test_a_trial_that_fails_otherwise_is_tried_again(
    started: list[list[str]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "text.txt").rename(place / "away.txt")
    assert run([*RATES, "--lr", "0.01"]) == 4
    err = capsys.readouterr().err
    assert "1 of 1 trials failed" in err
    assert "text.txt" in err
    (place / "away.txt").rename(place / "text.txt")
    assert states(capsys, *RATES, "--lr", "0.01") == {"adamw-lr0.01-seed0": "finished"}


@pytest.mark.parametrize("ended", [True, False])
def test_a_trial_that_outlived_a_killed_sweep_is_not_begun_anew(
    ended: bool, started: list[list[str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes its folder after the next sweep has looked for it."""
    show = module._show_plan

    def meanwhile(outcomes: Sequence[module.Outcome], console: Any) -> None:
        show(outcomes, console)
        made = Run.create(settle(outcomes[0].config, cuda=False)[0], None)
        append(made.folder / METRICS, [trained(2, 0.01), Evaluated(2, 0.01, 200, 0.1)])
        if ended:
            append(made.folder / EVENTS, [Finished(3, 0.01, 6.5, 384, 1.5, "checkpoint")])

    monkeypatch.setattr(module, "_show_plan", meanwhile)
    run([*RATES, "--lr", "0.01"])
    assert started == ([] if ended else [["resume", "runs/rates/adamw-lr0.01-seed0"]])


def test_what_does_not_fit_is_named_before_anything_runs(
    started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--method", "adamw,galore", "--rank", "4,8"]
    assert run([*RATES, *grid, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert (started, Path("runs").exists()) == ([], False)
    refused = [line.split() for line in err.splitlines() if line.strip().startswith("refused")]
    assert [words[1:] for words in refused] == [
        [f"galore-rank{rank}-seed0", "too", "large"] for rank in (4, 8)
    ]
    assert run([*RATES, *grid]) == 0
    assert [command[0] for command in started] == ["train"]
    assert run([*RATES, *grid, "--method", "galore", "--name", "none"]) == 3
    assert "none of the trials can run" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu", "refused"), [("2GiB", False), ("1MiB", True)])
def test_the_planner_says_what_fits(place: Path, gpu: str, refused: bool) -> None:
    flags = {"model": "small.json", "data.seq_len": 16, "train.batch": "4seq", "gpu": gpu}
    fixed = {"micro_batch": 4, "update": "unfused", "recompute": "keep", "clip": "off"}
    flags |= {f"train.{key}": value for key, value in fixed.items()}
    flags |= {"train.updates": 3, "train.device": "cpu", "optimizer.method": "adamw"}
    flags |= {"optimizer.states": "fp32", "train.logits": "keep"}
    forecast = forecast_of(load(flags, environ={}).config)
    assert bool(forecast.refused) == refused, forecast


def test_a_sweep_of_other_settings_needs_another_name(
    started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*RATES, "--lr", "0.01"]) == 0
    capsys.readouterr()
    assert run([*RATES, "--lr", "0.01", "--updates", "4"]) == 2
    err = capsys.readouterr().err
    assert "train.updates = 3, now it is 4" in err
    assert "fix: --name" in err


def test_a_file_can_be_swept_and_flags_change_its_settings(
    started: list[list[str]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "few.toml").write_text("[settings]\ntrain.updates = 9\n[[grid]]\nlr = [0.01, 0.02]\n")
    assert run(["sweep", "few.toml", *SETTINGS, "--method", "adamw"]) == 0
    assert len(list(Path("runs/few").glob("lr0.0*/config.toml"))) == 2
    (config,) = Path("runs/few/lr0.01-seed0").glob("config.toml")
    assert "updates = 3\n" in config.read_text()
    capsys.readouterr()
    assert run(["sweep", "few.toml", *SETTINGS, "--lr", "0.1"]) == 2
    assert "is varied by few.toml and given as a flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--seed", "1"], "--seed in a sweep"),
        (["--method", "adamv"], "'adamv' is unknown"),
        (["--lr", "x,y"], "optimizer.lr"),
        (["--seeds", "none"], "no number of seeds"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    started: list[list[str]], capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    assert run([*RATES, *arguments]) == 2
    assert what in capsys.readouterr().err
    assert not Path("runs").exists()


def test_trials_do_not_hear_the_settings_of_the_environment() -> None:
    environ = {"LOWMEM_LR": "1", "LOWMEM_CONFIG": "x", "LOWMEM_HOME": "h", "PATH": "p"}
    assert _without_settings(environ) == {"LOWMEM_HOME": "h", "PATH": "p"}


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_where_it_was(place: Path) -> None:
    command = [sys.executable, "-m", "lowmem", *RATES, "--lr", "0.01", "--seeds", "2"]
    command[command.index("--updates") + 1] = "400"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    metrics = Path("runs/rates/adamw-lr0.01-seed0/metrics.jsonl")
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert "everything is saved" in Path("runs/rates/trials/adamw-lr0.01-seed0.log").read_text()
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lowmem resume runs/rates/adamw-lr0.01-seed0" in done.stderr
    whole = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["update"] for line in whole if "lr" in line] == list(range(400))
