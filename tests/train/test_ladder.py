"""A run that meets the end of memory goes on, and comes to what it would have come to."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.errors import OutOfMemoryError
from lowmem.model.llama import Llama
from lowmem.phases import current_phase
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.tensorfile import read_tensors
from lowmem.train import loop
from lowmem.train.build import declared
from lowmem.train.cap import Cap
from lowmem.train.events import Eased, Event, Finished, Started, Trained
from lowmem.train.ladder import Ladder
from lowmem.train.loop import train
from lowmem.train.run import Run
from lowmem.train.rungs import rungs_of
from lowmem.transfers import HOST
from tests.train.faults import Faults

MakeConfig = Callable[..., Config]
UPDATES = 4
MODES = ("unfused", "fused+subspace", "fused")
GALORE = {"method": "galore", "rank": 4, "gap": 3, "staggered": False, "states": "8bit"}


@pytest.fixture
def start(ready_config: MakeConfig) -> Callable[..., Run]:
    """start("name", mode, optimizer, ...): a new run of four updates of eight sequences."""

    def make(name: str, mode: str, optimizer: dict[str, Any] | None = None, **sections: Any) -> Run:
        micro = 8 if mode == "fused" else 4
        train = {"updates": UPDATES, "update": mode, "micro_batch": micro}
        config = ready_config(
            optimizer=optimizer or GALORE,
            train=train | sections.pop("train", {}),
            **{
                "evaluate": {"tokens": 300, "every": 2},
                "checkpoint": {"every": 2, "behind": False},
                "schedule": {"kind": "constant", "warmup": 0},
                **sections,
            },
        )
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        return Run.create(config, None)

    return make


@pytest.fixture(autouse=True)
def _the_host_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are cut where no card is asked for memory; and garbage is not looked for each time,
    which would take most of the time of these tests."""
    monkeypatch.setattr("lowmem.train.ladder.gc.collect", lambda: 0)
    cut = loop._micro_batches

    def without_faults(*arguments: Any) -> Any:
        with _disable_current_modes():
            return cut(*arguments)

    monkeypatch.setattr(loop, "_micro_batches", without_faults)


class Report(list[Event]):
    """The events of a run; faults begin with its first update, and count anew in each."""

    def __init__(self, wanted: Callable[["Report", int], bool]) -> None:
        self.faults = Faults(lambda number: self.armed and wanted(self, number))
        self.armed, self.update, self.in_this = False, 0, 0

    def __call__(self, event: Event) -> None:
        self.append(event)
        if isinstance(event, Started):
            self.armed, self.faults.count = True, 0
        elif isinstance(event, Eased):
            self.in_this += 1
        elif isinstance(event, Trained):
            self.update, self.in_this, self.faults.count = event.update + 1, 0, 0

    @property
    def eased(self) -> list[Eased]:
        return [event for event in self if isinstance(event, Eased)]

    @property
    def steps(self) -> list[str]:
        return [event.step for event in self.eased]


Wanted = Callable[[Report, int], bool]


def trained(run: Run, corpus: Corpus, wanted: Wanted = lambda report, number: False) -> Report:
    report = Report(wanted)
    with report.faults:
        train(run, corpus, report)
    return report


def content(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and states of the newest checkpoint, and every figure of every update."""
    files = sorted(run.latest().rglob("*.safetensors"))
    tensors = {f"{file.name}/{key}": value for file in files for key, value in read_tensors(file)}
    timed = ("seconds", "tokens_per_second", "memory_bytes")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in run.metrics()]
    return tensors, lines


def require_same(one: Run, other: Run) -> None:
    """Bit for bit."""
    (tensors, lines), (expected, wanted_lines) = content(one), content(other)
    assert lines == wanted_lines
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def require_close(one: Run, other: Run, loss: float) -> None:
    """Losses within `loss` nats: what float32 sums in another order come to in four updates."""
    lines, expected = content(one)[1], content(other)[1]
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        for key in ("loss", "eval_loss"):
            assert line.get(key) == pytest.approx(wanted.get(key), abs=loss)


def in_phase(*names: str) -> bool:
    return any(phase.startswith(names) for phase in current_phase())


def failing_until(step: str, phase: str) -> Wanted:
    """Everything in that phase fails until that step has been taken."""
    return lambda report, number: in_phase(phase) and step not in report.steps


@pytest.mark.parametrize("mode", MODES)
def test_an_operation_that_fails_once_changes_no_bit(
    mode: str, start: Callable[..., Run], tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation in every update, in another place each time."""
    monkeypatch.setattr("lowmem.train.ladder.FREED_OFTEN", UPDATES)
    plain, disturbed = start("plain", mode), start("disturbed", mode)
    whole = trained(plain, tiny_corpus)
    places = (97, 240, 401, 300)
    report = trained(
        disturbed,
        tiny_corpus,
        lambda report, number: number == places[report.update % UPDATES] and not report.in_this,
    )
    assert report.faults.raised == UPDATES + 1  # the last one in what follows the last update
    assert set(report.steps) == {"free"}
    require_same(disturbed, plain)
    assert not whole.eased


def test_each_step_is_taken_in_its_turn_and_written_down(
    start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    """Less is kept: the same bits. Micro-batches are halved: the same batch, order and rates."""
    plain, down, halved = (start(name, "unfused") for name in ("plain", "down", "halved"))
    trained(plain, tiny_corpus)
    report = trained(down, tiny_corpus, failing_until("recompute", "backward of block 1"))
    assert report.steps == ["free", "slices", "recompute"]
    require_same(down, plain)
    report = trained(halved, tiny_corpus, failing_until("micro-batch", "backward of block 1"))
    assert report.steps == ["free", "slices", "recompute", "recompute", "micro-batch"]
    require_close(halved, plain, 1e-4)  # 8-bit moments widen the last bits; 2e-5 was seen
    lines, events = content(halved)[1], halved.folder / "events.jsonl"
    assert [(line.get("tokens"), line.get("lr")) for line in lines] == [
        (line.get("tokens"), line.get("lr")) for line in content(plain)[1]
    ]
    written = [json.loads(line) for line in events.read_text().splitlines()]
    eased = [line for line in written if line["event"] == "eased"]
    assert [line["step"] for line in eased] == report.steps
    assert eased[-1] == {
        "event": "eased",
        "update": 0,
        "step": "micro-batch",
        "said": "micro-batches of 2 sequences instead of 4",
        "where": "backward of block 1",
        "reason": eased[-1]["reason"],
    }
    assert isinstance(report[-1], Finished)
    assert report[-1].eased == [line["said"] for line in eased if line["step"] != "free"]


def test_smaller_slices_move_the_loss_by_rounding_alone(
    start: Callable[..., Run], tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 256)
    monkeypatch.setattr("lowmem.kernels.slices.SLICE_ELEMENTS", {"cuda": 2**12, "cpu": 2**12})
    slow = GALORE | {"lr": 1e-4}  # rounding alone, not what large steps make of it
    plain, sliced = (start(name, "unfused", slow) for name in ("plain", "sliced"))
    trained(plain, tiny_corpus)
    report = trained(sliced, tiny_corpus, failing_until("slices", "loss"))
    assert report.steps == ["free", "slices"]
    assert content(sliced)[1] != content(plain)[1]
    require_close(sliced, plain, 1e-5)


def test_block_inputs_go_to_host_memory_last(
    start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    one = {"micro_batch": 1}  # cannot be halved
    plain, lent = start("plain", "unfused", train=one), start("lent", "unfused", train=one)
    trained(plain, tiny_corpus)
    report = trained(lent, tiny_corpus, failing_until("boundaries", "backward of block 1"))
    assert report.steps == ["free", "slices", "recompute", "recompute", "boundaries"]
    require_same(lent, plain)


ON_HOST = {"boundaries": "host", "blocks": "host"}
PLACES = [
    pytest.param({"recompute": "full", **how}, place, id=place)
    for how, place in (({}, "device"), (ON_HOST, "host"))
]


@pytest.mark.parametrize(("how", "place"), PLACES)
def test_in_layer_major_order_every_operation_may_fail_once(
    how: dict[str, Any], place: str, start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    """Each of every update, before and after blocks have moved; none moves twice."""
    case = GALORE | {"place": place}
    plain, disturbed = (start(name, "layer-major", case, train=how) for name in ("plain", "cut"))
    trained(plain, tiny_corpus)
    report = trained(disturbed, tiny_corpus, lambda report, number: number % 2 == 1 and in_update())
    assert report.faults.raised > 1000
    assert set(report.steps) == {"free"}
    assert {"aten.mm.default", "aten._to_copy.default"} <= set(report.faults.names)
    require_same(disturbed, plain)


def in_update() -> bool:
    """In a loss or a step of training: evaluation has a ladder of its own."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not Ladder.gathered.__code__:
        frame = frame.f_back
    return frame.f_back is not None and bool(current_phase())


@pytest.mark.parametrize("where", ["forward of block 2", "backward of block 2"])
def test_in_layer_major_order_block_inputs_make_room_in_the_middle_of_an_update(
    where: str, start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    """Before the head has moved, and after, when the update cannot be made again."""
    full = {"recompute": "full", "micro_batch": 2}
    plain, lent = (start(name, "layer-major", train=full) for name in ("plain", "lent"))
    trained(plain, tiny_corpus)

    def wanted(report: Report, number: int) -> bool:
        short = report.update == 1 and in_phase(where)
        return short and current_phase()[-1] != HOST and "boundaries" not in report.steps

    report = trained(lent, tiny_corpus, wanted)
    assert report.steps == ["free", "boundaries"]
    require_same(lent, plain)
    state = json.loads((lent.latest() / "state.json").read_text())
    assert state["carried"]["ladder"]["boundaries"] == "host"


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
def test_a_run_that_nothing_helps_saves_and_goes_on_exactly(
    mode: str, start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    """Stopped in the update that chooses the subspaces anew; where it stood it goes on."""
    one = {"micro_batch": 1}  # cannot be halved
    plain, ended = start("plain", mode, train=one), start("ended", mode, train=one)
    trained(plain, tiny_corpus)

    def never(report: Report, number: int) -> bool:
        return report.update == 3 and in_phase("backward of block 1")

    report_of = []
    with pytest.raises(OutOfMemoryError) as caught:
        report_of.append(trained(ended, tiny_corpus, never))
    assert caught.value.exit_code == 7
    assert "everything is saved" in caught.value.why
    assert ended.latest().name == "step-000003"
    state = json.loads((ended.latest() / "state.json").read_text())
    rungs = state["carried"]["ladder"]
    assert (rungs["slices"], rungs["recompute"], rungs["micro_batch"]) == (4, "full", 1)
    # In fused+subspace the matrices of block 2 had theirs before block 1 failed.
    assert bool(rungs["prepared"]) == (mode == "fused+subspace")
    report = trained(ended, tiny_corpus)
    assert not report.eased
    assert isinstance(report[-1], Finished)
    assert report[-1].eased == ["resumed with slices 4, recompute full, boundaries host"]
    require_same(ended, plain)


@pytest.mark.parametrize("how", [("fused", {}), ("layer-major", {"recompute": "full", **ON_HOST})])
def test_weights_that_have_moved_are_not_saved_half_way(
    how: tuple[str, dict[str, Any]], start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    """Block 2 has moved when block 1 fails: the last checkpoint stands, exactly."""
    mode, train = how
    case = GALORE | ({"place": "host"} if train else {})
    plain, ended = (start(name, mode, case, train=train) for name in ("plain", "ended"))
    trained(plain, tiny_corpus)
    with pytest.raises(OutOfMemoryError) as caught:
        trained(
            ended,
            tiny_corpus,
            lambda report, number: in_phase("backward of block 1") and report.update == 3,
        )
    assert "the last checkpoint is where to resume" in caught.value.why
    assert ended.latest().name == "step-000002"
    trained(ended, tiny_corpus)
    require_same(ended, plain)


def test_a_fused_update_is_repeated_as_long_as_nothing_has_moved(
    start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    plain, down = start("plain", "fused"), start("down", "fused")
    trained(plain, tiny_corpus)
    report = trained(down, tiny_corpus, failing_until("recompute", "forward of block 2"))
    assert report.steps == ["free", "free", "slices", "recompute"]  # the call, then the update
    require_same(down, plain)


def test_an_evaluation_that_does_not_fit_leaves_training_alone(
    start: Callable[..., Run], tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, small = start("plain", "unfused"), start("small", "unfused")
    trained(plain, tiny_corpus)
    whole, seen = Llama.loss_sum, []

    def loss_sum(self: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(inputs))
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, inputs, targets)

    monkeypatch.setattr(Llama, "loss_sum", loss_sum)
    report = trained(small, tiny_corpus)
    assert report.steps == ["evaluation", "evaluation"]
    assert seen[:3] == [4, 2, 1]
    assert set(seen[3:]) == {1}  # kept for the rest of the run
    require_close(small, plain, 1e-6)
    tensors, expected = content(small)[0], content(plain)[0]
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


SMALL = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 400}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
SITES, APART = 160, 3  # operations that fail: of forward, loss, backward, receive and refresh
EVERYWHERE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "galore-8bit": ("unfused", GALORE | {"min_8bit": 0}, {}),
    "galore-8bit-subspace": ("fused+subspace", GALORE | {"min_8bit": 0}, {"clip": 0.5}),
    "galore-8bit-fused": ("fused", GALORE | {"min_8bit": 0}, {}),
    "adamw": ("unfused", {"method": "adamw", "rank": "auto"}, {"clip": 0.5}),
    "apollo": ("fused+subspace", {"method": "apollo", "rank": 4, "gap": 3}, {}),
    "frugal": ("fused+subspace", {"method": "frugal", "rank": "auto", "gap": 3}, {}),
    "fira": ("fused+subspace", {"method": "fira", "rank": 4, "gap": 3}, {"recompute": "full"}),
    "cosmos": ("fused", {"method": "cosmos", "rank": 4}, {"recompute": "attn"}),
    "scale": ("fused", {"method": "scale", "rank": "auto"}, {"logits": "keep"}),
    "sophia": ("unfused", {"method": "sophia", "rank": "auto"}, {}),
    "adahessian": ("unfused", {"method": "adahessian", "rank": "auto"}, {}),
    "q_galore-int8": ("fused+subspace", {"method": "q_galore", "rank": 4}, {"weights": "int8"}),
    "apollo-int8": ("fused", {"method": "q_apollo", "rank": 4}, {"weights": "int8"}),
    "galore-inputs": ("fused", GALORE, {"boundaries": "host", "recompute": "full"}),
    "galore-layers": ("layer-major", GALORE, {"recompute": "full"}),
    "frugal-layers-host": (
        "layer-major",
        {"method": "frugal", "rank": "auto", "gap": 3, "place": "host"},
        {"recompute": "full", **ON_HOST},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYWHERE)
def test_every_operation_of_an_update_may_fail(
    case: str, start: Callable[..., Run], tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third one of its gradients, in an update of its own; others in other cases."""
    monkeypatch.setattr("lowmem.train.ladder.FREED_OFTEN", SITES)
    mode, optimizer, train = EVERYWHERE[case]
    first = 1 + list(EVERYWHERE).index(case) % APART
    sections: dict[str, Any] = {
        "model": SMALL,
        "train": train | {"updates": SITES, "batch": "2seq", "micro_batch": 1 + (mode == "fused")},
        "data": {"source": str(tiny_corpus.folder), "seq_len": 16},
        "evaluate": {"tokens": 64, "every": 16},
        "checkpoint": {"every": 97, "behind": True},
        "guard": {"loss_z": "off", "norm_z": "off"},
    }
    plain, disturbed = (start(name, mode, optimizer, **sections) for name in ("plain", "disturbed"))
    trained(plain, tiny_corpus)
    report = trained(
        disturbed,
        tiny_corpus,
        lambda report, number: number == first + APART * report.update and not report.in_this,
    )
    assert report.faults.raised > SITES / 2  # some updates have fewer operations than that
    assert set(report.steps) == {"free"}
    require_same(disturbed, plain)


def test_smaller_micro_batches_are_taken_only_where_their_sums_leave_room(
    tiny_config: MakeConfig,
) -> None:
    """Of an update in one micro-batch bf16 gradients are held, of one in two float32 sums."""
    helps = {}
    for seq_len in (8, 64):
        config = tiny_config(
            optimizer={"method": "adamw"},
            data={"source": "sample", "seq_len": seq_len},
            train={
                "update": "unfused",
                "micro_batch": 8,
                "recompute": "full",
                "logits": "recompute",
                "weights": "bf16",
            },
        )
        plan = make_plan(config, find_card("24GB", "cpu"), [])
        model, optimizer = declared(plan.config, "meta")
        ladder = Ladder(model, optimizer, rungs_of(plan.config), plan, Cap(), lambda event: None)
        ladder.rungs["slices"] = 4
        helps[seq_len] = ladder._halve() is not None
        assert ladder.rungs["micro_batch"] == (4 if helps[seq_len] else 8)
    assert helps == {8: False, 64: True}


def test_loading_and_initialising_go_on_behind_a_call_that_failed(
    start: Callable[..., Run], tiny_corpus: Corpus
) -> None:
    int8 = {"weights": "int8"}
    plain, disturbed = (start(name, "fused", None, train=int8) for name in ("plain", "disturbed"))
    trained(plain, tiny_corpus)
    half = disturbed.config.train.model_copy(update={"updates": 2})
    for config in (disturbed.config.model_copy(update={"train": half}), disturbed.config):
        report = Report(lambda report, number: False)
        report.faults.wanted = lambda number: number % 29 == 1 and in_begin()
        with report.faults:
            train(Run(disturbed.folder, config), tiny_corpus, report)
        assert report.faults.raised
    require_same(disturbed, plain)


def in_begin() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_code is loop._begin.__code__:
            return True
        frame = frame.f_back
    return False
