"""What compare calls fair, and what it says of the rest."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowmem.analysis import compare as module
from lowmem.analysis.compare import Comparison, compared
from lowmem.analysis.history import read_all
from lowmem.analysis.published import published_beside
from lowmem.analysis.seeds import interval
from lowmem.planner.quality import evidence
from tests.analysis.conftest import MODEL, PAPERS, Make


def comparison(*folders: Path) -> Comparison:
    return compared(read_all(list(folders)))


def test_runs_that_differ_only_in_the_seed_are_one_setting(make_run: Make) -> None:
    losses = (4.0, 4.1, 4.3)
    folders = [make_run(f"a{n}", seed=n, final=loss) for n, loss in enumerate(losses)]
    (setting,) = comparison(*folders).settings
    expected = interval(losses)
    assert setting.loss == expected
    assert setting.seeds == [0, 1, 2]
    assert setting.perplexity is not None
    assert setting.perplexity.low == pytest.approx(math.exp(expected.low or 0))


def test_where_it_is_saved_and_what_it_is_called_makes_no_setting(make_run: Make) -> None:
    folders = [
        make_run("a", seed=0, checkpoint={"every": 2}, gpu="24GB"),
        make_run("b", seed=1, checkpoint={"every": 3}, gpu="12GB", evaluate={"every": 2}),
    ]
    assert len(comparison(*folders).settings) == 1


def test_equal_runs_of_two_methods_are_a_fair_comparison(make_run: Make) -> None:
    one = make_run("a", final=4.2)
    other = make_run("b", method="galore", final=4.0, optimizer={"rank": 8})
    found = comparison(one, other)
    assert found.is_fair
    assert [setting.label["method"] for setting in found.settings] == ["galore", "adamw"]
    assert found.settings[0].label["rank"] == "8"


DIFFERENT: dict[str, dict[str, Any]] = {
    "model": {"model": MODEL | {"num_hidden_layers": 3}},
    "tokens": {"losses": (6.0, 5.0)},
    "batch": {"train": {"batch": "8seq", "updates": 4}},
    "data": {"corpus": "deadbeef" * 8},
    "evaluation": {"eval_tokens": 999},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_unequal_is_named(make_run: Make, what: str) -> None:
    found = comparison(make_run("a"), make_run("b", method="galore", **DIFFERENT[what]))
    assert what in [difference.what for difference in found.differences]
    assert not found.is_fair
    assert all(setting.dominated_by is None for setting in found.settings)
    assert not found.to_json()["comparable"]


def test_every_fact_of_a_fair_comparison_is_tested_above(make_run: Make) -> None:
    (run,) = read_all([make_run("a")])
    facts = set(module._facts(run, with_corpus=True))
    assert facts == set(DIFFERENT) | {"protocol", "tokenizer"}


SCHEDULES: list[dict[str, Any]] = [
    {"kind": "constant"},
    {"warmup": 2},
    {"min_ratio": 0.0},
    {"cycle": 2},
    {"start": "zero"},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: next(iter(each)))
def test_methods_with_unequal_schedules_are_not_comparable(
    make_run: Make, schedule: dict[str, Any]
) -> None:
    one, other = make_run("a"), make_run("b", method="galore", schedule=schedule)
    assert [each.what for each in comparison(one, other).differences] == ["schedule"]


def test_schedules_may_be_what_is_compared(make_run: Make) -> None:
    """One method with two, or every method with both; the table shows which row has which."""
    folders = [
        make_run(f"{method}-{kind}", method=method, schedule={"kind": kind})
        for method in ("adamw", "galore")
        for kind in ("cosine", "constant")
    ]
    assert comparison(*folders[:2]).is_fair
    found = comparison(*folders)
    assert found.is_fair
    assert {setting.label["kind"] for setting in found.settings} == {"cosine", "constant"}
    (difference,) = comparison(*folders[:3]).differences
    assert difference.what == "schedule"


def test_a_warm_up_is_the_same_as_a_number_and_as_a_share(make_run: Make) -> None:
    one = make_run("a", schedule={"warmup": 0.5})
    assert comparison(one, make_run("b", method="galore", schedule={"warmup": 2})).is_fair


def test_formats_of_weights_and_clipping_are_shown_across_methods(make_run: Make) -> None:
    one = make_run("a", train={"weights": "bf16", "clip": 1.0})
    other = make_run("b", method="galore", train={"weights": "int8", "clip": 1.0})
    found = comparison(one, other)
    assert {setting.label["weights"] for setting in found.settings} == {"bf16", "int8"}
    assert all("clip" not in setting.label for setting in found.settings)


def test_another_protocol_is_named(make_run: Make) -> None:
    found = comparison(make_run("a"), make_run("b", method="galore", data=PAPERS))
    assert [each.what for each in found.differences] == ["protocol"]


def test_another_tokenizer_of_the_same_source_is_named(make_run: Make) -> None:
    kinds = {"data": {"tokenizer": "other"}, "corpus": "deadbeef" * 8}
    found = comparison(make_run("a"), make_run("b", method="galore", **kinds))
    assert [each.what for each in found.differences] == ["data", "tokenizer"]


def test_the_same_tokens_elsewhere_are_the_same_data(make_run: Make) -> None:
    moved = {"data": {"source": "/elsewhere/text", "tokenizer": "t5"}}
    assert comparison(make_run("a"), make_run("b", method="galore", **moved)).is_fair


def test_without_checkpoints_the_names_of_the_data_decide(make_run: Make) -> None:
    one = make_run("a", corpus=None)
    assert comparison(one, make_run("b", method="galore")).is_fair
    moved = make_run("c", method="galore", data={"source": "other"})
    assert [each.what for each in comparison(one, moved).differences] == ["data"]


def test_unequal_numbers_of_seeds_are_named(make_run: Make) -> None:
    folders = [make_run("a", seed=0), make_run("b", seed=1), make_run("c", method="galore")]
    (difference,) = comparison(*folders).differences
    assert (difference.what, sorted(difference.values)) == ("number of seeds", ["1", "2"])


def test_a_seed_that_was_run_twice_is_no_second_seed(make_run: Make) -> None:
    assert not comparison(make_run("a"), make_run("b")).is_fair


def test_a_setting_that_is_nowhere_better_names_who_dominates_it(make_run: Make) -> None:
    folders = [
        make_run("good", method="galore", final=4.0, peak=900),
        make_run("large", method="fira", final=3.9, peak=1000),
        make_run("bad", method="adamw", final=4.1, peak=950),
    ]
    found = comparison(*folders)
    methods = {setting.label["method"]: setting.dominated_by for setting in found.settings}
    assert methods == {"fira": None, "galore": None, "adamw": 2}


def test_times_of_two_machines_are_not_compared(make_run: Make) -> None:
    slow = make_run("a", final=4.0, seconds=9.0, environment={"threads": 8})
    found = comparison(slow, make_run("b", method="galore", final=4.1, seconds=0.1))
    assert "time" not in found.judged_by
    assert found.settings[1].dominated_by == 1
    assert any("8 threads" in note for note in found.notes)


def test_what_the_seeds_do_not_tell_apart_is_said(make_run: Make) -> None:
    one = [make_run(f"a{n}", seed=n, final=4.0 + n / 10) for n in range(3)]
    near = [make_run(f"b{n}", seed=n, final=4.05 + n / 10, method="galore") for n in range(3)]
    far = [make_run(f"c{n}", seed=n, final=6.0 + n / 100, method="fira") for n in range(3)]
    (note,) = [note for note in comparison(*one, *near, *far).notes if "tell apart" in note]
    assert "1, 2 (" in note


def test_unfinished_runs_and_damage_are_said(make_run: Make) -> None:
    folder = make_run("a", ended=False)
    (folder / "events.jsonl").write_text("x\n")
    notes = " ".join(comparison(folder).notes)
    assert "is unfinished: 4 of 4 updates" in notes
    assert "events.jsonl: 1 line is no record" in notes


def test_a_run_that_was_never_evaluated_stands_last(make_run: Make) -> None:
    found = comparison(make_run("a", final=None), make_run("b", method="galore"))
    assert [setting.perplexity is None for setting in found.settings] == [False, True]
    assert [each.what for each in found.differences] == ["evaluation"]


def test_published_results_stand_beside_runs_of_their_size_protocol_and_length(
    make_run: Make,
) -> None:
    settings: dict[str, Any] = {"model": "llama-60m", "method": "galore", "data": PAPERS}
    full = make_run("a", train={"updates": 10_000}, published=3.9, **settings)
    short = make_run("b", **settings)
    found = comparison(full)
    assert 34.88 in [row.ppl for row in found.settings[0].published]
    record = found.to_json()["settings"][0]
    assert record["published_protocol_perplexity"] == [pytest.approx(math.exp(3.9))]
    assert comparison(short).settings[0].published == []


def test_published_results_of_other_sizes_do_not_stand_beside_a_run(make_run: Make) -> None:
    (run,) = read_all([make_run("a", model="llama-60m", method="galore", data=PAPERS)])
    assert {row.size for row in published_beside(run)} == {"60m"}
    (small,) = read_all([make_run("b", method="galore", data=PAPERS)])
    assert published_beside(small) == []


def test_published_results_do_not_stand_beside_packed_text(make_run: Make) -> None:
    folder = make_run("a", model="llama-60m", method="galore", train={"updates": 10_000})
    assert comparison(folder).settings[0].published == []
    assert any(row.method == "galore" and row.updates == 10_000 for row in evidence())


def test_the_record_is_json(make_run: Make) -> None:
    record = comparison(make_run("a"), make_run("b", seed=1)).to_json()
    again = json.loads(json.dumps(record, allow_nan=False))
    assert again["settings"][0]["seeds"] == [0, 1]
    assert again["settings"][0]["perplexity"]["low"] == pytest.approx(math.exp(4.0))
