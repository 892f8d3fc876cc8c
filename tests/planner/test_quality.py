"""The evidence: whole, sourced, and never better for less."""

import itertools
import math
import re
import subprocess
import sys
import zlib

import pytest

from lowmem.config.presets import preset_names, read_preset
from lowmem.config.recompute import levels_of
from lowmem.config.schema import Config, ModelConfig, StatePlace
from lowmem.optim.methods import METHODS
from lowmem.optim.methods.spec import SIZES
from lowmem.planner import quality
from lowmem.planner.best import search
from lowmem.planner.candidates import Kind, families
from lowmem.planner.candidates import quality as quality_of
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Card, Choice
from lowmem.planner.quality import CLASS, DOUBT, Evidence, automatic, evidence, penalty
from lowmem.planner.ways import Way

NAMES = ["galore", "fira", "apollo", "apollo_mini", "q_galore", "scale", "muon", "stable_spam"]
PARAMETERS = {row.size: row.parameters for row in evidence()}


def the_row(method: str, size: str, source: str) -> Evidence:
    (row,) = [r for r in evidence() if (r.method, r.size, r.source) == (method, size, source)]
    return row


def test_every_row_has_a_source_and_a_sensible_value() -> None:
    assert len(evidence()) > 200
    for row in evidence():
        assert re.match(r"arXiv:\d{4}\.\d{5}, .+", row.source) or row.mark == "second-hand"
        assert row.mark in ("published", "second-hand")
        assert 5 < row.ppl < 1000
        assert row.rank is None or 0 < row.rank <= 1
        assert row.moments in ("8bit", "bf16", "fp32")
        assert row.weights in ("int8", "bf16", "fp32")


def test_no_row_stands_there_twice() -> None:
    keys = [(r.method, r.variant, r.rank, r.size, r.source) for r in evidence()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("method", "size", "source", "ppl", "adamw", "tuned"),
    [
        ("galore", "60m", "arXiv:2403.03507, Table 2", 34.88, 34.06, 30.05),
        ("galore", "7b", "arXiv:2403.03507, Table 3", 14.65, None, 14.61),
        ("fira", "350m", "arXiv:2410.01623, Table 18", 17.03, None, 18.42),
        ("apollo_mini", "7b", "arXiv:2412.05270, Table 3", 13.09, None, 14.61),
        ("q_galore", "7b", "arXiv:2407.08296, Table 2, at 40k updates", 18.83, None, 18.09),
        ("scale", "1b", "arXiv:2506.16659, README", 14.25, 16.52, 15.56),
        ("frugal", "60m", "arXiv:2410.01623, Table 18", 34.91, None, 30.05),
    ],
)
def test_known_rows_are_there_with_both_adamws(
    method: str, size: str, source: str, ppl: float, adamw: float | None, tuned: float
) -> None:
    row = the_row(method, size, source)
    assert (row.ppl, row.adamw, row.tuned) == (ppl, adamw, tuned)
    assert row.penalty == pytest.approx(math.log(ppl / tuned))


def test_no_published_adamw_is_better_than_the_tuned_one() -> None:
    """But for 1B in a table of logarithms of two decimals."""
    for row in evidence():
        if row.adamw is not None and row.tuned is not None and "2410.16029" not in row.source:
            assert row.adamw >= row.tuned
        if row.method in ("adamw", "adam8bit") and row.counts:
            assert row.penalty >= 0


def test_sizes_are_those_of_the_presets() -> None:
    for size in ("60m", "130m", "350m", "1b", "7b"):
        assert PARAMETERS[size] == read_preset(f"llama-{size}").parameters
        assert PARAMETERS[size] == pytest.approx(SIZES[size], rel=0.01)


def test_every_exception_is_a_method_and_has_a_reason() -> None:
    for table in ("by_name_only", "parents"):
        assert quality._file()[table].keys() <= METHODS.keys()
    assert all(len(reason) > 20 for reason in quality._file()["by_name_only"].values())


def groups() -> list[tuple[tuple[str, str, float | None], list[Evidence]]]:
    """Rows of the same method, size and rank, whose moments are as coarse as any there."""
    rows = [row for row in evidence() if row.counts and row.mark == "published"]

    def key(row: Evidence) -> tuple[str, str, float | None]:
        return row.method, row.size, row.rank

    ordered = sorted(rows, key=lambda row: (row.method, row.size, row.rank or 0.0))
    return [(each, list(rows)) for each, rows in itertools.groupby(ordered, key=key)]


@pytest.mark.parametrize(("at", "rows"), groups(), ids=lambda value: str(value)[:40])
def test_at_the_rows_the_value_is_that_of_the_rows(
    at: tuple[str, str, float | None], rows: list[Evidence]
) -> None:
    method, size, rank = at
    found = penalty(method, rank, "fp32", PARAMETERS[size])
    assert found.nats == pytest.approx(sum(row.penalty for row in rows) / len(rows), abs=1e-12)
    assert found.mark == "published"
    assert all(row.source in found.source for row in rows)


def test_between_the_rows_it_is_linear_in_the_logarithms() -> None:
    size = math.sqrt(PARAMETERS["1b"] * PARAMETERS["7b"])
    ends = [penalty("scale", None, "fp32", PARAMETERS[each]).nats for each in ("1b", "7b")]
    assert penalty("scale", None, "fp32", size).nats == pytest.approx(sum(ends) / 2)
    rank = math.sqrt(0.125 * 0.25)
    ends = [penalty("apollo", each, "fp32", PARAMETERS["60m"]).nats for each in (0.125, 0.25)]
    between = penalty("apollo", rank, "fp32", PARAMETERS["60m"])
    assert between.nats == pytest.approx(sum(ends) / 2)
    assert between.mark == "published"


@pytest.mark.parametrize("method", [*METHODS, "of_another_package"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit", "own"])
def test_every_method_has_a_value_with_a_source(method: str, moments: str) -> None:
    for parameters, rank in itertools.product((1e6, 6e7, 5e9, 7e10), (None, 0.001, 0.25, 1.0)):
        found = penalty(method, rank, moments, parameters)
        assert math.isfinite(found.nats)
        assert found.source
        assert (found.mark == "no evidence") == bool(found.doubts)
        assert found.source in found.sentence()


def test_without_rows_the_parent_and_a_hundredth() -> None:
    """lion has none: AdamW's, which is zero; a package's method likewise."""
    for method in ("lion", "of_another_package"):
        found = penalty(method, None, "fp32", 6e7)
        assert (found.nats, found.mark) == (DOUBT, "no evidence")
        assert f"no evidence for {method}, so as adamw" in found.sentence()


def test_far_from_every_size_nothing_is_better_than_adamw() -> None:
    assert penalty("scale", None, "fp32", 26e9).nats < 0  # within a factor of four of 7B
    for parameters in (1.8e6, 1.4e7, 30e9, 1e12):
        for method in METHODS:
            found = penalty(method, 0.25, "fp32", parameters)
            assert found.nats >= (0.0 if method == "adamw" else DOUBT)
            assert found.mark == "no evidence" or method == "adamw"


def test_second_hand_rows_count_only_where_nothing_is_published() -> None:
    assert penalty("racs", None, "fp32", PARAMETERS["1b"]).mark == "second-hand"
    muon = penalty("muon", None, "fp32", PARAMETERS["7b"])  # 12.72, but by hearsay
    assert muon.mark == "no evidence"
    assert muon.nats == pytest.approx(DOUBT)
    assert "second-hand" in penalty("racs", None, "fp32", PARAMETERS["1b"]).sentence()


@pytest.mark.parametrize("method", NAMES)
def test_less_is_never_better(method: str) -> None:
    """Coarser moments at any rank and size; a rank below all rows."""
    for parameters in (1e6, 2e7, 6e7, 2e8, 1e9, 3e9, 7e9, 1e11):
        for rank in (0.5, 0.25, 0.1, 0.01):
            nats = [penalty(method, rank, states, parameters).nats for states in ("fp32", "8bit")]
            assert nats == sorted(nats)
        low = [penalty(method, rank, "fp32", parameters).nats for rank in (0.05, 0.02, 0.001)]
        assert low == sorted(low)


def test_only_published_methods_are_automatic() -> None:
    chosen = automatic([*METHODS, "of_another_package"])
    published = {row.method for row in evidence() if row.mark == "published"}
    assert set(chosen) <= published | {"adamw"}
    assert chosen == [name for name in METHODS if name in chosen]
    assert not {"racs", "cosmos", "soap", "spam", "lion", "magma"} & set(chosen)


@pytest.mark.parametrize("preset", preset_names())
def test_the_order_is_that_of_the_penalties(preset: str) -> None:
    model = read_preset(preset)
    tried = [family.best for family in families(Config(), model)]
    nats = [quality_of(kind, model).nats for kind in tried]
    rungs = [math.floor(each / CLASS + 1e-6) for each in nats]
    assert rungs == sorted(rungs)
    assert {kind.method for kind in tried} == set(automatic(list(METHODS)))


@pytest.mark.parametrize("preset", ["llama-tiny", "llama-9m"])
def test_a_small_first_run_is_plain_adamw(preset: str) -> None:
    assert families(Config(), read_preset(preset))[0].best == Kind("adamw", None, "fp32", "fp32")


class Imagined(Job):
    """A job whose sizes are made up: more rank, moments, modes and micro-batch need more."""

    seed = 0

    def persistent(
        self, kind: Kind, place: StatePlace = "device", blocks: StatePlace = "device"
    ) -> int:
        base = zlib.crc32(f"{self.seed} {kind.method}".encode()) % 1000
        rank = kind.rank if isinstance(kind.rank, int) else 0
        states = {"8bit": 1, "bf16": 2}.get(kind.states, 4)
        return base + states * (10 + rank) + (100 if kind.weights == "bf16" else 50)

    def sums(self, choice: Choice) -> int:
        return 0 if choice.update == "fused" else 100

    def tensors(self, choice: Choice) -> int:
        cost = {"keep": 9, "attn": 5, "full": 1}
        levels = levels_of(choice.recompute, self.model.num_hidden_layers)
        kept = sum(cost[level] for level in levels) / len(levels)
        above = self.sums(choice) + round(kept * choice.micro_batch)
        return self.persistent(kind_of(choice)) + above

    def peak(self, choice: Choice) -> int:
        return self.tensors(choice)


def imagined(model: ModelConfig, seed: int) -> Imagined:
    data, train = {"seq_len": 256}, {"batch": "16seq", "weights": "bf16", "device": "cuda"}
    config = Config.model_validate({"data": data, "train": train})
    job = Imagined(config, Card("", 0, 0, 0, 0, ""), model, 16, 256, "")
    job.seed = seed
    return job


@pytest.mark.parametrize("preset", ["llama-9m", "llama-130m", "llama-1b", "llama-7b"])
@pytest.mark.parametrize("seed", range(3))
def test_removing_memory_never_gives_a_better_penalty(preset: str, seed: int) -> None:
    model = read_preset(preset)
    job = imagined(model, seed)
    earlier = None
    for room in range(5400, -1, -300):
        _, choice = search(job, room)
        if choice is None:
            break
        assert job.peak(choice) <= room
        assert choice.method in automatic(list(METHODS))
        rung = quality_of(kind_of(choice), model).rung
        assert earlier is None or rung >= earlier
        earlier = rung
        kinds = [f.kind(rank) for f in families(job.config, model) for rank in f.ranks]
        fitting = [kind for kind in kinds if job.fits(_least(job, kind), room)]
        assert rung == min(quality_of(kind, model).rung for kind in fitting)
    else:
        raise AssertionError("everything fitted into nothing")


def _least(job: Imagined, kind: Kind) -> Choice:
    """Of the settings that the search allows, the smallest in these made-up sizes."""
    settings = itertools.product(["unfused", "fused"], [1, 16])
    found = [
        job.choice(kind, Way(mode), "full", "recompute", micro)  # type: ignore[arg-type]
        for mode, micro in settings
    ]
    allowed = [one for one in found if one.update != "fused" or one.micro_batch == 16]
    return min(allowed, key=job.peak)


def test_the_evidence_needs_no_torch() -> None:
    code = "import sys, lowmem.planner.quality as q; q.evidence(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
