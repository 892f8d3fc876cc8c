"""A run that goes on with another micro-batch or recomputation: same batches, other rounding."""

from collections.abc import Callable
from typing import Any

import pytest

from lowmem.cli.main import run as command
from lowmem.config.schema import Config
from lowmem.data.batches import Batches, UpdateBatch
from lowmem.data.shards import Corpus
from lowmem.tensorfile import read_tensors
from lowmem.train.build import text_of
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]


def finished(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        (["--micro-batch", "3"], False),
        pytest.param(["--micro-batch", "1"], False, marks=pytest.mark.slow),
        (["--recompute", "full"], True),  # recomputed activations are the same numbers
        (["--micro-batch", "2", "--recompute", "attn"], False),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [
        ("unfused", {"method": "galore", "rank": 4}),
        pytest.param("unfused", {"method": "adamw", "rank": "auto"}, marks=pytest.mark.slow),
        pytest.param("fused+subspace", {"method": "adamw", "rank": "auto"}, marks=pytest.mark.slow),
    ],
)
def test_another_micro_batch_or_recomputation_changes_only_rounding(
    mode: str,
    optimizer: dict[str, Any],
    flags: list[str],
    exact: bool,
    ready_config: MakeConfig,
    tiny_corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ready_config(
        optimizer=optimizer | {"lr": 0.003},
        train={"updates": 8, "update": mode},
        checkpoint={"every": 4, "keep": 3},
    )
    run = Run.create(config, None)
    train(run, tiny_corpus, lambda event: None)
    before = finished(run)
    weights = dict(read_tensors(run.latest() / "model" / "model.safetensors"))
    seen: list[tuple[int, str]] = []
    of: Callable[[Any, int], UpdateBatch] = Batches.of

    def noted(batches: Batches, update: int) -> Any:
        seen.append((update, of(batches, update).digest()))
        return of(batches, update)

    monkeypatch.setattr(Batches, "of", noted)
    start = run.checkpoints / "step-000004"
    assert command(["resume", str(start), *flags, "--quiet"]) == 0
    assert {update for update, _ in seen} >= {4, 5, 6, 7}
    assert dict(seen) == {u: of(text_of(config, tiny_corpus)[0], u).digest() for u, _ in seen}
    after = finished(run)
    assert after[:4] == before[:4]
    if exact:
        assert after == before
        return
    # Four float32 updates with sums in another order: the bound of docs/checkpoints.md.
    assert after == pytest.approx(before, abs=1e-4)
    again = dict(read_tensors(run.latest() / "model" / "model.safetensors"))
    for name, weight in weights.items():
        assert (again[name] - weight).norm() <= 1e-2 * weight.norm(), name
    reopened = Run.open(run.folder).config.train
    assert reopened.micro_batch == int(flags[1])  # and stays so


def test_what_cannot_be_changed_is_refused(
    ready_config: MakeConfig, tiny_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = Run.create(ready_config(train={"update": "fused"}), None)
    train(fused, tiny_corpus, lambda event: None)
    text = (fused.folder / "config.toml").read_text()
    for flags, told in (
        (["--micro-batch", "4"], "fused updates cannot accumulate"),
        (["--micro-batch", "9"], "--micro-batch 8"),
        (["--micro-batch", "0"], "0 must be a whole number"),
        (["--recompute", "some"], "'some' is not a level"),
        (["--from", "last"], "--from last must be previous"),
    ):
        assert command(["resume", str(fused.folder), *flags]) == 2
        assert told in capsys.readouterr().err
    assert (fused.folder / "config.toml").read_text() == text


def test_the_previous_intact_checkpoint_is_taken_when_asked(
    ready_config: MakeConfig, tiny_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(ready_config(checkpoint={"every": 2, "keep": 3}), None)
    train(run, tiny_corpus, lambda event: None)
    whole = {path.name: path.read_bytes() for path in run.latest().rglob("*.safetensors")}
    for name in ("step-000006", "step-000004"):
        path = run.checkpoints / name / "optimizer" / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert command(["resume", str(run.folder)]) == 5
    assert f"lowmem resume {run.folder} --from previous" in capsys.readouterr().err
    assert command(["resume", str(run.folder), "--from", "previous"]) == 0
    assert "step-000002" in capsys.readouterr().err
    again = {path.name: path.read_bytes() for path in run.latest().rglob("*.safetensors")}
    assert again == whole
