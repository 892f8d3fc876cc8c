"""The planner: it keeps its promises, never overrides, and explains what it rejects."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lowmem.config.defaults import settle
from lowmem.config.presets import read_preset
from lowmem.config.schema import Config, SumFormat
from lowmem.errors import ConfigError
from lowmem.kernels.slices import SLICE_ELEMENTS
from lowmem.optim.methods import METHODS, MethodSpec
from lowmem.planner.best import SUM_FORMATS
from lowmem.planner.candidates import Kind
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job
from lowmem.planner.plan import SCHEMA_VERSION, Choice, Plan
from lowmem.planner.search import _in_any_form, make_plan
from lowmem.planner.speed import matrices
from lowmem.planner.ways import Way, modes
from lowmem.units import GIB


def plan_of(model: str, gpu: str, *, cuda: bool = True, **sections: Any) -> Plan:
    config = Config.model_validate({"model": model, "gpu": gpu, **sections})
    config, notes = settle(config, cuda=cuda)
    return make_plan(config, find_card(gpu, config.train.device), notes)


def test_seven_billion_fit_24gb_with_the_best_published_method() -> None:
    """One update of 32 sequences needs no sums; SCALE has 12.59 at 7B, and next to no states."""
    plan = plan_of("llama-7b", "24GB")
    assert plan.fits
    assert plan.choice.method == "scale"
    assert plan.quality is not None
    assert plan.quality.nats == pytest.approx(math.log(12.59 / 14.61))
    assert "arXiv:2506.16659" in plan.quality.source
    assert plan.candidates[0].quality == plan.quality
    shown = [(row.choice.method, row.reason) for row in plan.candidates[1:3]]
    assert shown == [("apollo", "next in quality"), ("apollo_mini", "next in quality")]
    assert [row.reason for row in plan.candidates[3:]] == ["fastest", "smallest"]
    assert plan.candidates[0].reason == "chosen"
    said = json.loads(json.dumps(plan.to_json()))
    assert said["quality"]["source"] == said["candidates"][0]["quality"]["source"]
    assert said["quality"]["nats"] == pytest.approx(-0.149, abs=1e-3)
    assert "method scale: the best published quality that fits" in plan.notes
    assert plan.memory.tensors <= plan.memory.allocated <= plan.memory.reserved
    assert plan.memory.reserved <= plan.card.usable_bytes
    assert sum(plan.memory.parts.values()) == plan.memory.tensors
    assert said["schema_version"] == SCHEMA_VERSION


@pytest.mark.slow
def test_seven_billion_fit_8gb_with_a_desktop() -> None:
    plan = plan_of("llama-7b", "8GB", train={"batch": "1seq"})
    assert plan.fits
    assert (plan.choice.weights, plan.choice.ends, plan.choice.update) == ("int8", "int8", "fused")


def test_adamw_at_7b_does_not_fit_and_says_what_helps() -> None:
    fixed: dict[str, Any] = {
        "optimizer": {"method": "adamw", "states": "fp32"},
        "train": {"weights": "bf16"},
    }
    plan = plan_of("llama-7b", "24GB", **fixed)
    assert not plan.fits
    assert plan.choice.method == "adamw"
    assert plan.memory.reserved > 60 * GIB
    assert plan.fixes[0].flags.startswith("--update layer-major")  # the same method, exactly
    assert plan.fixes[1].flags.startswith("--method galore")
    assert plan.fixes[0].fits
    assert [fix.saves for fix in plan.fixes] == sorted(
        (fix.saves for fix in plan.fixes), reverse=True
    )


@pytest.mark.parametrize(
    "fixed",
    [
        {"optimizer": {"method": "galore", "rank": 33}},
        {"optimizer": {"states": "8bit"}},
        {"optimizer": {"rank": 64}},
        {"optimizer": {"method": "adamw", "states": "bf16"}},
        {"train": {"update": "fused"}},
        {"train": {"recompute": "attn"}},
        {"train": {"micro_batch": 5}},
        {"train": {"clip": 0.3}},
        {"train": {"clip": "off"}},
        {"train": {"weights": "fp32", "batch": "7seq"}},
        {"data": {"seq_len": 100}},
    ],
)
def test_what_the_user_fixed_is_never_changed(fixed: dict[str, Any]) -> None:
    plan = plan_of("llama-9m", "8GB", **fixed)
    for section, values in fixed.items():
        for key, value in values.items():
            assert getattr(getattr(plan.config, section), key) == value
            if hasattr(plan.choice, key) and value != "off":
                assert getattr(plan.choice, key) == value


def test_a_plan_leaves_nothing_open() -> None:
    """But the rank of a method that has none, what only layer-major order has, and the trial, which
    the device of a run decides."""
    config = plan_of("llama-9m", "8GB").config.model_dump()
    elsewhere = {
        ("optimizer", "rank"),
        ("train", "blocks"),
        ("train", "trial"),
    }
    open_keys = [
        f"{section}.{key}"
        for section in ("optimizer", "train", "evaluate", "checkpoint")
        for key, value in config[section].items()
        if value == "auto" and (section, key) not in elsewhere
    ]
    assert not open_keys


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"update": "fused", "clip": 1.0}}, "train.clip = 1.0 with train.update"),
        (
            {"train": {"update": "fused", "micro_batch": 2, "batch": "8seq"}},
            "cannot accumulate 8 sequences",
        ),
        ({"train": {"micro_batch": 9, "batch": "8seq"}}, "train.micro_batch = 9 is more than"),
        ({"train": {"update": "fused", "sums": "int8"}}, 'train.sums = "int8" with train.update'),
        (
            {"optimizer": {"method": "sophia"}, "train": {"sums": "bf16"}},
            "train.sums = \"bf16\" with method 'sophia'",
        ),
        ({"optimizer": {"method": "adamw", "rank": 8}}, "optimizer.rank = 8 does not suit"),
        ({"optimizer": {"method": "galor"}}, "optimizer.method = 'galor' is unknown"),
        ({"optimizer": {"method": "galore", "rnak": 8}}, "optimizer.rnak is unknown"),
        ({"optimizer": {"method": "galore", "gap": 0}}, "optimizer.gap = 0 does not suit"),
        ({"optimizer": {"method": "adam8bit", "states": "fp32"}}, "optimizer.states = 'fp32'"),
        ({"data": {"seq_len": 4096}}, "data.seq_len = 4096 is more than the model's 1024"),
    ],
)
def test_contradictions_are_told(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of("llama-9m", "8GB", **sections)


SIZES = ("5GiB", "6GiB", "8GiB", "12GiB")


@pytest.mark.slow
def test_more_memory_never_gives_a_smaller_rank() -> None:
    """Of the same states and updates: left open, a smaller rank with finer states may be better."""
    ranks = []
    for gpu in SIZES:
        optimizer = {"method": "galore", "states": "8bit"}
        plan = plan_of("llama-1b", gpu, optimizer=optimizer, train={"update": "fused+subspace"})
        ranks.append(plan.choice.rank if plan.fits else 0)
    assert ranks == sorted(ranks)
    assert ranks[-1] > ranks[0]


@pytest.mark.slow
def test_more_memory_never_gives_a_worse_quality() -> None:
    nats = []
    for gpu in SIZES:
        plan = plan_of("llama-1b", gpu, optimizer={"method": "galore"})
        assert plan.quality is not None
        nats.append(plan.quality.nats)
    assert nats == sorted(nats, reverse=True)
    assert nats[-1] < nats[0]


def test_what_the_allocator_takes_is_guessed_well() -> None:
    config = Config.model_validate({"model": "llama-60m", "gpu": "24GB"})
    config, _ = settle(config, cuda=True)
    card = find_card("24GB", "cuda")
    plan = make_plan(config, card, [])
    job = Job.of(config, card)
    assert job.tensors(plan.choice) == plan.memory.tensors
    assert job.peak(plan.choice) == pytest.approx(plan.memory.reserved, rel=0.03)


@pytest.mark.slow
def test_a_choice_near_the_brim_is_made_to_fit() -> None:
    """Fragmentation beyond the estimate must shrink the micro-batch, not refuse the run."""
    plan = plan_of("llama-7b", "24GB", data={"source": "c4"}, train={"sums": "fp32"})
    assert plan.fits
    assert plan.choice.method == "galore"  # the best that sums 512 sequences in its subspace
    assert plan.choice.update == "fused+subspace"
    assert plan.choice.accumulate > 1
    rejected = {row.choice.method: row.reason for row in plan.candidates if not row.fits}
    for method in ("scale", "apollo", "apollo_mini", "adamw", "adam8bit"):
        assert "too much in weights, states and sums alone" in rejected[method]
    assert plan.memory.reserved > 0.9 * plan.card.usable_bytes


@pytest.mark.slow
def test_coarser_sums_make_a_better_method_fit() -> None:
    plan = plan_of("llama-7b", "24GB", data={"source": "c4"})
    assert plan.fits
    assert (plan.choice.method, plan.choice.weights) == ("scale", "int8")
    assert (plan.choice.update, plan.choice.sums) == ("unfused", "bf16")
    assert plan.choice.accumulate > 1


@pytest.mark.parametrize("kind", [Kind("scale", None, "fp32"), Kind("galore", 8, "8bit")])
def test_the_cheap_bound_is_never_more_than_the_peak(kind: Kind) -> None:
    """Or the search would reject what fits."""
    sections = {"train": {"batch": "4seq"}}
    config, _ = settle(Config.model_validate({"model": "llama-tiny", **sections}), cuda=False)
    job = Job.of(config, find_card("8GB", "cpu"))
    for level, micro in itertools.product(("keep", "full"), (1, 4)):
        for mode in modes(config, kind, job.rows):
            if mode == "fused" and micro < job.rows:
                continue
            choice = job.choice(kind, Way(mode), level, "recompute", micro)
            least = job.persistent(kind)
            assert least <= least + job.sums(choice) < job.peak(choice)


@pytest.fixture
def summing(monkeypatch: pytest.MonkeyPatch) -> Job:
    """AdamW on a small model, 8 sequences one by one. Slices are short, for host sums have some on
    the card, and sequences long, so that backward is the peak."""
    monkeypatch.setitem(SLICE_ELEMENTS, "cuda", 2**16)
    how = {"batch": "8seq", "micro_batch": 1, "weights": "bf16", "recompute": "full"}
    how |= {"boundaries": "keep"}
    sections = {
        "data": {"seq_len": 1024},
        "optimizer": {"method": "adamw", "states": "fp32"},
        "train": how | {"logits": "recompute"},
    }
    config, _ = settle(Config.model_validate({"model": "llama-9m", **sections}), cuda=True)
    return Job.of(config, find_card("8GB", "cuda"))


def summed(job: Job, sums: SumFormat) -> Choice:
    kind = Kind("adamw", None, "fp32", sums=sums)
    return job.choice(kind, Way("unfused"), "full", "recompute", 1)


def test_sums_are_no_coarser_than_it_takes_to_fit(summing: Job) -> None:
    peaks = {sums: summing.peak(summed(summing, sums)) for sums in SUM_FORMATS}
    assert list(peaks.values()) == sorted(set(peaks.values()), reverse=True)
    for sums, peak in peaks.items():
        found = _in_any_form(summing, peak)[2]
        assert found == summed(summing, sums)
        assert _in_any_form(summing, peak - 1)[2] != found
    assert _in_any_form(summing, peaks["host"] - 1)[2] is None


def test_sums_in_host_memory_are_counted_there(summing: Job) -> None:
    """4 bytes of every weight with 4096 elements or more, and a page of each to align it."""
    choice = summed(summing, "host")
    model = read_preset("llama-9m")
    sizes = [(m * n, count) for m, n, count in matrices(model)]
    sizes.append((model.vocab_size * model.hidden_size, 2))
    large = sum((-(-4 * size // 4096) + 1) * 4096 * count for size, count in sizes)
    assert summing.host(choice) == large
    assert summing.memory(choice).host == large
    assert summing.memory(choice).tensors == summing.tensors(choice)
    assert summing.host(summed(summing, "int8")) == 0


def test_a_machine_without_the_memory_gets_no_host_sums(
    summing: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, needed = (of(summed(summing, "host")) for of in (summing.peak, summing.host))
    here = replace(summing, card=replace(summing.card, source="measured"))
    for free, chosen in ((needed - 1, None), (needed, summed(summing, "host"))):
        monkeypatch.setattr("lowmem.planner.search.available_memory", lambda free=free: free)
        assert _in_any_form(here, peak)[2] == chosen
        assert _in_any_form(summing, peak)[2] == summed(summing, "host")  # a card elsewhere


def eight_at_once(method: str, **train: Any) -> Job:
    """Long sequences on a small model, all in one micro-batch."""
    how = {"batch": "8seq", "micro_batch": 8, "weights": "bf16", "ends": "exact"} | train
    optimizer = {"method": method, "states": "fp32"}
    sections = {"data": {"seq_len": 1024}, "optimizer": optimizer, "train": how}
    config, _ = settle(Config.model_validate({"model": "llama-9m", **sections}), cuda=True)
    return Job.of(config, find_card("8GB", "cuda"))


def test_block_inputs_are_in_host_memory_where_nothing_else_fits() -> None:
    job = eight_at_once("adamw", update="fused")
    stays = job.choice(Kind("adamw", None, "fp32"), Way("fused"), "full", "recompute", 8)
    goes = replace(stays, boundaries="host")
    assert job.peak(goes) < job.peak(stays)
    assert _in_any_form(job, job.peak(stays))[2] == stays
    found = _in_any_form(job, job.peak(stays) - 1)[2]
    assert found is not None
    assert replace(found, recompute="full") == goes  # there may be room to recompute less
    assert _in_any_form(job, job.peak(goes))[2] == goes
    assert _in_any_form(job, job.peak(goes) - 1)[2] is None
    kept = eight_at_once("adamw", update="fused", boundaries="keep")
    assert _in_any_form(kept, job.peak(stays) - 1)[2] is None


def test_a_plan_says_that_block_inputs_are_in_host_memory() -> None:
    job = eight_at_once("adamw", update="fused")
    stays = job.choice(Kind("adamw", None, "fp32"), Way("fused"), "full", "recompute", 8)
    card = replace(job.card, total=job.peak(stays) - 1, context=0, others=0, margin=0)
    plan = make_plan(job.config, card, [])
    assert plan.fits
    assert plan.config.train.boundaries == "host"
    assert plan.memory.host == job.host(plan.choice) > 0
    assert plan.memory.tensors == job.tensors(plan.choice)
    assert "block inputs in host memory instead of on the card" in plan.departures[0]
    again = make_plan(plan.config, card, [])
    assert again.choice == plan.choice
    assert not any("instead" in note for note in again.notes)  # now it was asked for


@pytest.mark.parametrize(("method", "train"), [("adamw", {"update": "fused"}), ("sophia", {})])
def test_where_host_sums_are_no_choice_nothing_fits_and_no_contradiction_is_told(
    method: str, train: dict[str, Any]
) -> None:
    job = eight_at_once(method, **train)
    assert _in_any_form(job, 2**20)[2] is None


def test_a_plan_says_that_sums_are_coarser() -> None:
    config, notes = settle(
        Config.model_validate(
            {
                "model": "llama-9m",
                "gpu": "8GB",
                "optimizer": {"method": "adamw", "states": "fp32"},
                "train": {"batch": "8seq", "micro_batch": 1, "weights": "bf16"},
            }
        ),
        cuda=True,
    )
    card = find_card("8GB", "cuda")
    job = Job.of(config, card)
    room = job.peak(summed(job, "fp32")) - 1
    plan = make_plan(config, replace(card, total=room, context=0, others=0, margin=0), notes)
    assert plan.fits
    assert plan.choice.sums == "bf16"
    assert plan.config.train.sums == "bf16"
    assert "bf16 sums" in plan.choice.sentence()
    said = "bf16 sums of gradients instead of fp32 ones on the card, which do not fit"
    assert plan.departures[0] == said
    again = make_plan(plan.config, plan.card, [])
    assert again.choice == plan.choice
    assert said not in again.notes  # now it was asked for


def test_a_table_of_ranks_is_planned() -> None:
    rank = {"attention": 16, "mlp": 48}
    plan = plan_of("llama-9m", "8GB", optimizer={"method": "galore", "rank": rank})
    assert plan.choice.rank == rank
    assert plan.fits


def test_a_plan_is_rehearsed_and_filled_by_the_sheet() -> None:
    """The settings of the recipe are in the configuration, and the notes say where from."""
    asked = {"method": "galore", "rank": 8, "states": "fp32", "staggered": False}
    plan = plan_of("llama-9m", "8GB", optimizer=asked)
    assert plan.config.optimizer.options == {"staggered": False, "gap": 200, "scale": 0.25}
    notes = "\n".join(plan.notes)
    assert "lr 0.01: from the sheet of galore (60m recipe), arXiv:2403.03507" in notes
    assert "gap 200, scale 0.25: from the sheet of galore (60m recipe)" in notes
    assert "side std, solver iteration, on_refresh keep" in notes
    assert "staggered" not in notes  # the user knows


@pytest.mark.parametrize(("given", "said"), [({}, "gap 200, scale 0.25"), ({"gap": 5}, "scale")])
def test_only_what_was_not_given_is_said(given: dict[str, Any], said: str) -> None:
    plan = plan_of("llama-9m", "8GB", optimizer={"method": "galore", "rank": 8, **given})
    (line,) = [n for n in plan.notes if n.endswith("recipe)") and not n.startswith("lr")]
    assert line.startswith(said)
    assert plan.config.optimizer.options["gap"] == given.get("gap", 200)


def test_the_rehearsed_method_has_the_settings_of_the_sheet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recipe that makes state smaller must make the plan smaller."""
    sheet = METHODS["galore"]
    smaller = {"any": {"lr": 0.01, "rank": 32, "min_8bit": 0}}
    larger = {"any": {"lr": 0.01, "rank": 32, "min_8bit": 10**9}}
    peaks = []
    for recipes in (smaller, larger):
        monkeypatch.setitem(METHODS, "galore", MethodSpec(sheet.build, recipes, ""))
        asked = {"method": "galore", "states": "8bit"}
        peaks.append(plan_of("llama-9m", "8GB", optimizer=asked).memory.tensors)
    assert peaks[0] < peaks[1]


def test_a_method_that_has_no_galore_options_gets_no_galore_fix() -> None:
    """GaLore does not take what only Muon has: it can be neither suggested nor rehearsed."""
    options = {"method": "muon", "states": "fp32", "nesterov": False}
    plan = plan_of("llama-9m", "850MiB", optimizer=options, train={"weights": "fp32"})
    assert not plan.fits
    assert not any("galore" in fix.flags for fix in plan.fixes)
