"""Bad updates: what counts as one, what is done, and that a stopped run decides no differently."""

import json
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lowmem.config.schema import CALM, Config, GuardConfig
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus
from lowmem.errors import DivergedError, Stopped
from lowmem.tensorfile import read_tensors, sha256_of
from lowmem.train import loop
from lowmem.train.checkpoint import verify
from lowmem.train.divergence import Guard, robust_score
from lowmem.train.events import Event, RolledBack, Skipped, Trained
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]


def test_the_score_is_the_modified_z_score() -> None:
    known = np.random.default_rng(0).normal(3.0, 0.1, 101)
    median = np.median(known)
    deviation = np.median(np.abs(known - median)) / 0.6744897501960817  # the normal's quartile
    score, found = robust_score(4.0, known.tolist(), 1e-3)
    assert found == median
    assert score == pytest.approx((4.0 - median) / deviation, rel=1e-4)


def test_equal_losses_do_not_make_rounding_a_spike() -> None:
    score, _ = robust_score(3.0001, [3.0] * 50, 1e-3)
    assert score < 1


def filled(config: GuardConfig, losses: list[float], norms: list[float]) -> Guard:
    guard = Guard.of(config, None)
    for update, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        guard.accept(update, loss, norm)
    return guard


def noise(count: int, middle: float, spread: float) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(middle, spread) for _ in range(count)]


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [
        (3.0, 1.0, None),
        (3.5, 1.0, None),  # 5 deviations
        (1.0, 0.0, None),  # a fall is none
        (5.0, 1.0, "the loss is"),
        (3.0, 12.0, "the gradient norm is"),
        (math.nan, 1.0, "not finite"),
        (3.0, math.inf, "not finite"),
    ],
)
def test_spikes_and_what_is_not_finite_are_bad(loss: float, norm: float, what: str | None) -> None:
    guard = filled(GuardConfig(), noise(128, 3.0, 0.1), noise(128, 1.0, 0.1))
    said = guard.trouble(loss, norm)
    assert (said is None) if what is None else (said is not None and what in said)


def test_spikes_can_be_switched_off_and_need_half_a_window() -> None:
    losses, norms = noise(128, 3.0, 0.1), noise(128, 1.0, 0.1)
    off = GuardConfig(loss_z="off", norm_z="off")
    assert filled(off, losses, norms).trouble(50.0, 1e6) is None
    assert filled(off, losses, norms).trouble(math.nan, 1.0) is not None
    assert filled(GuardConfig(), losses[:63], norms[:63]).trouble(50.0, 1.0) is None
    assert filled(GuardConfig(), losses[:64], norms[:64]).trouble(50.0, 1.0) is not None


def test_a_falling_loss_and_heavy_tailed_norms_are_no_spikes() -> None:
    """The defaults are conservative: 4,000 ordinary updates, not one false alarm."""
    draw = random.Random(1)
    guard = Guard.of(GuardConfig(), None)
    for update in range(4_000):
        loss = 3.0 + 8.0 * math.exp(-update / 500) + draw.gauss(0.0, 0.08)
        norm = math.exp(draw.gauss(0.0, 0.5))  # the largest of them is about 6 medians
        assert guard.trouble(loss, norm) is None, update
        guard.accept(update, loss, norm)


def test_an_incident_skips_then_goes_back_further_each_time_then_gives_up() -> None:
    config = GuardConfig(skips=2, rollbacks=2, back=10)
    guard = filled(config, noise(200, 3.0, 0.1), noise(200, 1.0, 0.1))
    verdicts = [guard.refuse(update, spoilt=False) for update in (200, 203, 204)]
    assert verdicts == ["skip", "skip", "roll back"]
    first = guard.rollback("loss nan")
    assert (first.first, first.last, first.number) == (190, 204, 1)
    guard = filled(config, noise(180, 3.0, 0.1), noise(180, 1.0, 0.1))
    guard.rolled_back(first)
    assert [u for u in range(180, 210) if guard.leaves_out(u)] == list(range(190, 205))
    for update in range(180, 190):
        guard.accept(update, 3.0, 1.0)
    assert guard.refuse(205, spoilt=True) == "roll back"
    second = guard.rollback("loss nan")
    assert (second.first, second.last, second.number) == (185, 205, 2)
    guard.rolled_back(second)
    assert guard.refuse(206, spoilt=True) == "give up"


def test_a_calm_stretch_ends_the_incident() -> None:
    guard = filled(GuardConfig(skips=1), noise(100, 3.0, 0.1), noise(100, 1.0, 0.1))
    assert guard.refuse(100, spoilt=False) == "skip"
    for update in range(101, 101 + CALM):
        guard.accept(update, 3.0, 1.0)
    assert (guard.first_bad, guard.bad) == (None, 0)
    assert guard.refuse(200, spoilt=False) == "skip"


def test_the_memory_survives_json_exactly() -> None:
    guard = filled(GuardConfig(), noise(150, 3.0, 0.1), noise(150, 1.0, 0.1))
    guard.refuse(150, spoilt=False)
    guard.rolled_back(guard.rollback("x"))
    again = Guard.of(GuardConfig(), json.loads(json.dumps(guard.state())))
    assert again == guard
    assert again.losses.maxlen == 128


# Whole runs: the batches of chosen updates give a loss that is no number.


def poison(monkeypatch: pytest.MonkeyPatch, batches: Batches, bad: Callable[[int], bool]) -> None:
    """Make updates whose batch is that of a bad update end in NaN, weights included if fused."""
    known = {repr(batches.of(update).rows[0].tolist()): update for update in range(40)}
    gather = loop.gather

    def poisoned(model: Any, optimizer: Any, micro: Any, **how: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = next(iter(micro))
        row = [*inputs[0].tolist(), int(targets[0, -1])]
        loss, norm = gather(model, optimizer, micro, **how)
        if not bad(known[repr(row)]):
            return loss, norm
        if optimizer.mode == "fused":
            model.head_weight.data.fill_(math.nan)
        return loss * math.nan, norm

    monkeypatch.setattr(loop, "gather", poisoned)


@pytest.fixture
def tiny_batches(tiny_corpus: Corpus) -> Batches:
    assert tiny_corpus.train is not None
    return Batches(tiny_corpus.train, seq_len=32, rows_per_update=8, seed=0)


def made(config: Config, name: str) -> Run:
    run = config.run.model_copy(update={"name": name})
    return Run.create(config.model_copy(update={"run": run}), None)


def hashes(run: Run) -> dict[str, str]:
    return {p.name: sha256_of(p) for p in sorted(run.latest().rglob("*.safetensors"))}


def losses(run: Run) -> dict[int, float]:
    return {line["update"]: line["loss"] for line in run.metrics() if "loss" in line}


MODES = ["unfused", "fused+subspace", "fused"]
GUARDS: dict[str, dict[str, Any]] = {
    "skip": {"skips": 3},
    "roll back": {"skips": 0, "rollbacks": 2, "back": 2},
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_bad_batch_is_stepped_past_and_the_run_ends_well(
    mode: str,
    guard: str,
    ready_config: MakeConfig,
    tiny_corpus: Corpus,
    tiny_batches: Batches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ready_config(
        train={"updates": 12, "update": mode},
        checkpoint={"every": 2},
        guard=GUARDS[guard],
    )
    poison(monkeypatch, tiny_batches, lambda update: update == 7)
    run = made(config, "a")
    events: list[Event] = []
    finished = train(run, tiny_corpus, events.append)
    back = [event for event in events if isinstance(event, RolledBack)]
    rolls = guard == "roll back" or mode == "fused"
    assert bool(back) == rolls
    skipped = {event.update for event in events if isinstance(event, Skipped)}
    how_far = GUARDS[guard].get("back", 16)
    left_out = set(range(max(0, 7 - how_far), 8)) if rolls else {7}
    assert skipped == left_out
    assert losses(run).keys() == set(range(12)) - left_out
    assert math.isfinite(finished.eval_loss)
    assert finished.tokens == (12 - len(left_out)) * 8 * 32
    (first,) = [e for e in events if isinstance(e, Skipped) and "not finite" in e.why]
    assert first.sequences[0].startswith("train-00000.bin at token ")
    shard, token = first.sequences[0].split(" at token ")
    assert tiny_corpus.train is not None
    text = np.fromfile(tiny_corpus.folder / shard, "<u2")[int(token) : int(token) + 33]
    assert text.tolist() == tiny_batches.of(7).rows[0].tolist()


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("mode", ["unfused", pytest.param("fused", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_again_and_again_decides_as_an_unbroken_one(
    mode: str,
    guard: str,
    every: int,
    ready_config: MakeConfig,
    tiny_corpus: Corpus,
    tiny_batches: Batches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the bad batch, just after it, and while it comes by again after a rollback."""
    config = ready_config(
        train={"updates": 12, "update": mode, "weights": "bf16"},
        checkpoint={"every": 4},
        guard=GUARDS[guard] | {"back": 2},
        evaluate={"every": 4, "tokens": 500},
    )
    poison(monkeypatch, tiny_batches, lambda update: update == 7)
    whole = made(config, "whole")
    train(whole, tiny_corpus, lambda event: None)
    broken = made(config, "broken")
    stops = 0
    done = []

    def stop(event: Event) -> None:
        if isinstance(event, Trained):
            done.append(event.update)
            if len(done) % every == 0:
                signal.raise_signal(signal.SIGTERM)

    while True:
        try:
            train(Run.open(broken.folder), tiny_corpus, stop)
            break
        except Stopped:
            stops += 1
    assert stops >= 3
    assert losses(broken) == losses(whole)
    assert hashes(broken) == hashes(whole)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_nothing_helps_ends_with_a_usable_checkpoint(
    mode: str,
    ready_config: MakeConfig,
    tiny_corpus: Corpus,
    tiny_batches: Batches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ready_config(
        train={"updates": 30, "update": mode},
        checkpoint={"every": 1, "keep": 20},
        guard={"skips": 2, "rollbacks": 2, "back": 1},
    )
    poison(monkeypatch, tiny_batches, lambda update: update >= 7)
    run = made(config, "a")
    events: list[Event] = []
    with pytest.raises(DivergedError, match="not finite") as caught:
        train(run, tiny_corpus, events.append)
    assert caught.value.exit_code == 6
    assert [e.number for e in events if isinstance(e, RolledBack)] == [1, 2]
    verify(run.latest())
    assert str(run.latest()) in caught.value.why
    for path in Path(run.latest()).rglob("*.safetensors"):
        assert all(value.float().isfinite().all() for _, value in read_tensors(path))
