"""A run goes on with other settings: the same data and schedule, a loss that does not jump."""

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.cli.main import run as command
from lowmem.config.schema import Config
from lowmem.data.batches import Batches, UpdateBatch
from lowmem.data.shards import Corpus
from lowmem.tensorfile import read_tensors
from lowmem.train.build import text_of
from lowmem.train.checkpoint import signed
from lowmem.train.elastic import first_that_fits, halved, ways_down
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]
HALF = 6


@pytest.fixture
def begun(ready_config: MakeConfig, tiny_corpus: Corpus) -> Callable[..., Run]:
    """A finished run of 12 updates, with a checkpoint at the sixth."""

    def make(optimizer: dict[str, Any], name: str = "a", **more: Any) -> Run:
        config = ready_config(
            optimizer=optimizer | {"lr": 0.003},
            train={"updates": 2 * HALF} | more,
            checkpoint={"every": HALF, "keep": 3},
        )
        named = config.run.model_copy(update={"name": name})
        run = Run.create(config.model_copy(update={"run": named}), None)
        train(run, tiny_corpus, lambda event: None)
        return run

    return make


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


def middle(run: Run) -> Path:
    return run.checkpoints / f"step-{HALF:06d}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def converted(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "converted"]


GALORE = {"method": "galore", "rank": 8}
CASES: list[Any] = [
    (GALORE, ["--rank", "4", "--states", "8bit", "--weights", "int8"]),
    *(
        pytest.param(optimizer, flags, marks=pytest.mark.slow)
        for optimizer, flags in [
            (GALORE, ["--states", "8bit"]),
            (GALORE, ["--rank", "4"]),
            (GALORE, ["--rank", "16", "--states", "bf16"]),
            (GALORE, ["--weights", "int8"]),
            (GALORE, ["--weights", "bf16", "--update", "fused+subspace"]),
            (GALORE, ["--method", "fira"]),
            ({"method": "adamw", "rank": "auto"}, ["--method", "adam8bit"]),
            ({"method": "apollo", "rank": 8}, ["--rank", "4"]),
        ]
    ),
]


@pytest.mark.parametrize(("optimizer", "flags"), CASES, ids=lambda value: str(value))
def test_a_converted_run_goes_on_without_a_jump(
    optimizer: dict[str, Any],
    flags: list[str],
    begun: Callable[..., Run],
    tiny_corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = begun(optimizer)
    unbroken, before = losses(run), contents(middle(run))
    seen: list[tuple[int, str]] = []
    of: Callable[[Any, int], UpdateBatch] = Batches.of

    def noted(batches: Batches, update: int) -> Any:
        seen.append((update, of(batches, update).digest()))
        return of(batches, update)

    monkeypatch.setattr(Batches, "of", noted)
    assert command(["resume", str(middle(run)), *flags, "--quiet"]) == 0
    after = losses(run)
    assert len(after) == len(unbroken)
    assert after[:HALF] == unbroken[:HALF]
    # Losses fall from 6.0 to about 5.5 here; a state in another basis would be noise of that size.
    assert after[HALF:] == pytest.approx(unbroken[HALF:], abs=0.1)
    original = text_of(run.config, tiny_corpus)[0]
    assert dict(seen) == {update: of(original, update).digest() for update in dict(seen)}
    rates = [line["lr"] for line in run.metrics() if "lr" in line]
    assert len(rates) == 2 * HALF
    assert contents(middle(run)) == before
    (event,) = converted(run)
    assert event["update"] == HALF
    assert not all(part["exact"] for part in event["parts"])


ON_HOST = {"update": "layer-major", "boundaries": "host", "blocks": "host"}
ADAMW = {"method": "adamw", "rank": "auto"}
FRUGAL = {"method": "frugal", "rank": "auto", "gap": 4}
TO_HOST = ["--update", "layer-major", "--boundaries", "host", "--place", "host", "--blocks", "host"]


@pytest.mark.parametrize(
    ("optimizer", "how", "flags"),
    [
        (ADAMW | {"place": "host"}, ON_HOST, ["--update", "unfused"]),
        (GALORE, {}, TO_HOST),
        *(
            pytest.param(optimizer, how, flags, marks=pytest.mark.slow)
            for optimizer, how, flags in [
                (GALORE | {"states": "8bit", "place": "host"}, ON_HOST, ["--update", "unfused"]),
                (FRUGAL | {"place": "host"}, ON_HOST, ["--update", "unfused", "--place", "device"]),
                (FRUGAL, {"boundaries": "host"}, TO_HOST),
                (ADAMW | {"place": "host"}, {}, ["--place", "device", "--boundaries", "host"]),
            ]
        ),
    ],
    ids=lambda value: str(value),
)
def test_layer_major_order_and_host_memory_come_and_go_and_no_bit_changes(
    optimizer: dict[str, Any], how: dict[str, Any], flags: list[str], begun: Callable[..., Run]
) -> None:
    """In the middle of a run, whose weights, states and losses are those of a plain one."""
    plain = begun({k: v for k, v in optimizer.items() if k != "place"}, "plain", micro_batch=3)
    run = begun(optimizer, micro_batch=3, **how)
    assert command(["resume", str(middle(run)), *flags, "--quiet"]) == 0
    assert losses(run) == losses(plain)
    found, expected = (
        {name: value for name, value in contents(each.latest()).items() if "safetensors" in name}
        for each in (run, plain)
    )
    assert list(found.values()) == list(expected.values())
    assert len(found) == 2
    (event,) = converted(run)
    assert all(part["error"] == 0.0 for part in event["parts"])


@pytest.mark.slow
def test_the_first_loss_after_a_conversion_of_states_is_that_of_the_same_weights(
    begun: Callable[..., Run],
) -> None:
    run = begun(GALORE)
    unbroken = losses(run)
    assert command(["resume", str(middle(run)), "--rank", "4", "--states", "8bit", "-q"]) == 0
    assert losses(run)[HALF] == unbroken[HALF]
    assert losses(run)[HALF + 1] != unbroken[HALF + 1]


@pytest.mark.slow
def test_weights_in_a_wider_format_have_the_same_values(begun: Callable[..., Run]) -> None:
    run = begun(GALORE, weights="bf16")
    state = dict(read_tensors(middle(run) / "model" / "model.safetensors"))
    assert command(["resume", str(middle(run)), "--weights", "fp32", "-q"]) == 0
    (event,) = converted(run)
    weights = next(part for part in event["parts"] if part["part"] == "weights")
    assert weights["exact"]
    assert weights["error"] == 0.0
    assert all(value.dtype == torch.bfloat16 for value in state.values())


def test_a_resumed_run_is_resumed_and_changed_again(begun: Callable[..., Run]) -> None:
    run = begun(GALORE)
    assert command(["resume", str(middle(run)), "--rank", "4", "-q"]) == 0
    first = losses(run)
    # The checkpoint of update 6 still has rank 8, that of update 12 has rank 4.
    assert command(["resume", str(middle(run)), "-q"]) == 0
    assert losses(run) == first  # converted again, to the same bits
    assert command(["resume", str(middle(run)), "--rank", "8", "-q"]) == 0
    assert Run.open(run.folder).config.optimizer.rank == 8
    ranks = [
        tomllib.loads((run.folder / f"config-{number}.toml").read_text())["optimizer"]["rank"]
        for number in (1, 2)
    ]
    assert ranks == [8, 4]


@pytest.mark.slow
def test_unchanged_settings_are_no_conversion(begun: Callable[..., Run]) -> None:
    run = begun(GALORE)
    unbroken = losses(run)
    assert command(["resume", str(middle(run)), "-q"]) == 0
    assert losses(run) == unbroken
    assert not converted(run)


BAD: list[tuple[list[str], int, list[str]]] = [
    (["--rank", "0"], 2, ["rank"]),
    (["--method", "galor"], 2, ["galor", "galore"]),
    (["--method", "adamw"], 2, ["optimizer.lr", "--lr 0.001"]),
    (["--states", "4bit"], 2, ["4bit", "8bit"]),
    (["--micro-batch", "9"], 2, ["micro_batch = 9"]),
    (["--gpu", "865MB"], 3, ["does not fit"]),
    (["--seq-len", "64"], 2, ["--seq-len"]),
    (["--tokenizer", "other"], 2, ["--tokenizer"]),
    (["--model", "llama-60m"], 2, ["--model"]),
    (["--lr", "0.1"], 2, ["all 12 updates", "earlier checkpoint"]),  # nothing is left to change
]


def test_a_bad_request_changes_nothing(
    begun: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(GALORE)
    before = contents(run.folder)
    for flags, code, words in BAD:
        capsys.readouterr()
        assert command(["resume", str(run.folder), *flags]) == code, flags
        shown = capsys.readouterr().err
        assert all(word in shown for word in words), shown
        assert "Traceback" not in shown
        assert contents(run.folder) == before, flags


def forget_settings(folder: Path) -> None:
    """Make a checkpoint one of an older lowmem, with a manifest that agrees."""
    state = json.loads((folder / "state.json").read_text())
    del state["settings"]
    text = json.dumps(state).encode()
    (folder / "state.json").write_bytes(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["state.json"] = {
        "size": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))


@pytest.mark.slow
def test_a_checkpoint_without_settings_is_resumed_but_not_converted(
    begun: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(GALORE)
    forget_settings(middle(run))
    capsys.readouterr()
    unbroken = losses(run)
    assert command(["resume", str(middle(run)), "--rank", "4", "-q"]) == 5
    assert "does not say what settings" in capsys.readouterr().err
    assert command(["resume", str(middle(run)), "-q"]) == 0
    assert losses(run) == unbroken


class _Fits:
    """A plan of which only this is looked at."""

    def __init__(self, fits: bool) -> None:
        self.fits, self.choice = fits, self

    def sentence(self) -> str:
        return "..."


def test_a_smaller_card_takes_the_first_way_down_that_fits(ready_config: MakeConfig) -> None:
    config = ready_config(optimizer={"rank": 32, "states": "fp32"}, train={"weights": "bf16"})
    said = [text for text, _ in ways_down(config, {"gpu"})]
    assert said == [
        "the run's settings",
        "another micro-batch and recomputation",
        "sums of gradients in another format",
        "8-bit states",
        "rank 16",
        "rank 8",
        "rank 4",
        "int8 weights",
    ]
    for number in range(len(said)):
        tried: list[Config] = []

        def plan_of(candidate: Config, tried: list[Config] = tried, number: int = number) -> Any:
            tried.append(candidate)
            return _Fits(len(tried) > number)

        plan, ways = first_that_fits(config, {"gpu"}, plan_of)
        assert plan.fits
        assert [way.said for way in ways] == said[: number + 1]
        assert [way.fits for way in ways] == [False] * number + [True]
    last = tried[-1]
    assert (last.optimizer.states, last.optimizer.rank) == ("8bit", 4)
    assert (last.train.weights, last.train.micro_batch) == ("int8", "auto")
    given = {"gpu", "optimizer.rank", "optimizer.states", "train.weights", "train.micro_batch"}
    assert all(way.optimizer == config.optimizer for _, way in ways_down(config, given))
    assert all(way.train.micro_batch == 8 for _, way in ways_down(config, given))


def test_half_a_rank() -> None:
    assert halved({"attention": 64, "mlp": 0.5}) == {"attention": 32, "mlp": 0.25}
    assert halved({"attention": 64, "mlp": 4}) is None
    assert halved("auto") is None


@pytest.mark.slow
def test_another_card_is_planned_for_and_the_plan_is_kept(begun: Callable[..., Run]) -> None:
    run = begun(GALORE)
    assert command(["resume", str(middle(run)), "--gpu", "2GB", "-q"]) == 0
    changed = Run.open(run.folder)
    assert changed.config.gpu == "2GB"
    assert changed.config.optimizer.rank == 8
    assert changed.plan() is not None
