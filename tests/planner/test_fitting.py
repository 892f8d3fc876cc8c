"""What the search promises: monotone in memory, exact in rank, and true to what was chosen."""

import random
from typing import Any

import pytest

from lowmem.config.defaults import settle
from lowmem.config.schema import MOVE_EARLY, Config
from lowmem.planner.best import _speed_class, search
from lowmem.planner.candidates import Kind, families, quality, rank_share
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Choice, Plan
from lowmem.planner.search import make_plan
from lowmem.planner.table import other_rows
from lowmem.planner.ways import Way
from lowmem.units import MIB


def job_of(model: str, **sections: Any) -> Job:
    config = Config.model_validate({"model": model, "gpu": "24GB", **sections})
    config, _ = settle(config, cuda=True)
    return Job.of(config, find_card("24GB", "cuda"))


def found(job: Job, mib: float) -> Choice | None:
    return search(job, round(mib * MIB))[1]


@pytest.fixture(scope="module")
def small() -> Job:
    """A job whose rehearsals are shared by the tests."""
    return job_of("llama-9m", train={"batch": "16seq"})


def worth(job: Job, choice: Choice) -> tuple[int, bool, int]:
    rung = quality(kind_of(choice), job.model).rung
    return rung, choice.update in MOVE_EARLY, _speed_class(job, choice)


def test_more_memory_never_gives_a_worse_plan(small: Job) -> None:
    """Worse: a class of quality below, clipping lost, or 3 % slower with equal quality."""
    earlier = None
    for mib in (900, 500, 380, 320, 280, 240, 200, 160, 100):
        choice = found(small, mib)
        if choice is None:
            break
        assert small.peak(choice) <= mib * MIB
        now = worth(small, choice)
        # A class of speed may be lost to a larger rank at the same quality.
        assert earlier is None or now[:2] >= earlier[:2]
        assert earlier is None or now[:2] > earlier[:2] or now[2] >= earlier[2] - 1
        earlier = now
    else:
        raise AssertionError("everything fitted into nothing")


@pytest.mark.parametrize("mib", [300, pytest.param(180, marks=pytest.mark.slow)])
def test_the_smallest_and_the_fastest_row_are_so_in_the_table(small: Job, mib: int) -> None:
    rows, choice = search(small, mib * MIB)
    assert choice is not None
    shown = [row for row in other_rows(small, choice, rows, mib * MIB) if row.fits]
    smallest, fastest = (
        next(row for row in shown if label in row.reason) for label in ("smallest", "fastest")
    )
    assert smallest == min(shown, key=lambda row: row.peak_bytes)
    assert fastest == min(shown, key=lambda row: small.seconds(row.choice))
    # What is compared has been replayed: a guess would be some MiB above it.
    chosen = next(row for row in shown if row.choice == choice)
    for row in (smallest, chosen):
        assert row.peak_bytes == small.memory(row.choice).reserved


def test_no_row_is_called_fastest_where_no_speed_is_known() -> None:
    """On a CPU the choice is ranked by a common one, whose rates nobody would recognise."""
    sections: dict[str, Any] = {"model": "llama-tiny", "train": {"device": "cpu", "batch": "2seq"}}
    config, notes = settle(Config.model_validate(sections), cuda=False)
    plan = make_plan(config, find_card("8GB", "cpu"), notes)
    assert plan.speed is None
    reasons = [row.reason for row in plan.candidates]
    assert not any("fastest" in reason for reason in reasons)
    assert any("smallest" in reason for reason in reasons)


@pytest.mark.parametrize(
    "mib", [300, *(pytest.param(mib, marks=pytest.mark.slow) for mib in (420, 700))]
)
def test_fixing_what_was_chosen_changes_nothing(small: Job, mib: int) -> None:
    choice = found(small, mib)
    assert choice is not None
    given = {
        "optimizer.method": choice.method,
        "optimizer.states": choice.states,
        "train.weights": choice.weights,
        "train.update": choice.update,
        "train.recompute": choice.recompute,
        "train.logits": choice.logits,
        "train.micro_batch": choice.micro_batch,
    }
    if choice.rank is not None:
        given["optimizer.rank"] = choice.rank
    for key, value in given.items():
        section, name = key.split(".")
        fixed = job_of("llama-9m", **_with(section, {name: value}))
        assert found(fixed, mib) == choice, key


def _with(section: str, values: dict[str, Any]) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {"train": {"batch": "16seq"}}
    return sections | {section: sections.get(section, {}) | values}


@pytest.mark.parametrize("gpu", ["1GiB", pytest.param("2GiB", marks=pytest.mark.slow)])
def test_a_resolved_configuration_is_planned_the_same_again(gpu: str) -> None:
    def plan_of(config: Config) -> Plan:
        settled, notes = settle(config, cuda=True)
        return make_plan(settled, find_card(gpu, "cuda"), notes)

    config = Config.model_validate({"model": "llama-9m", "gpu": gpu, "train": {"batch": "8seq"}})
    first = plan_of(config)
    assert first.fits
    again = plan_of(first.config)
    assert again.choice == first.choice
    assert again.memory == first.memory
    assert again.config == first.config


@pytest.mark.parametrize("rank", ["fit", "fit-fraction", "fit-mlp"])
def test_the_largest_rank_that_fits_is_found(rank: str) -> None:
    """One more does not fit, and less memory never gives a larger one."""
    asked = {"method": "galore", "states": "8bit", "rank": rank}
    fixed = {"batch": "4seq", "update": "fused+subspace", "weights": "bf16"}
    job = job_of("llama-9m", optimizer=asked, train=fixed)
    ranks = families(job.config, job.model)[0].ranks
    earlier = None
    for mib in (236, 228, 222, 219.5, 218):
        choice = found(job, mib)
        index = -1 if choice is None else ranks.index(choice.rank)
        assert earlier is None or index <= earlier
        earlier = index
        if choice is None or index + 1 == len(ranks):
            continue
        more = job.choice(
            Kind("galore", ranks[index + 1], "8bit"),
            Way(choice.update),
            "full",
            "recompute",
            1,
        )
        assert not job.fits(more, round(mib * MIB))


def test_a_budget_one_matrix_smaller_gives_a_smaller_rank() -> None:
    asked = {"method": "galore", "states": "8bit", "rank": "fit"}
    fixed = {"update": "fused+subspace", "weights": "int8", "batch": "512seq"}
    job = job_of("llama-7b", optimizer=asked, train=fixed)
    matrix = job.model.hidden_size**2 * 2 / MIB
    here, less = (found(job, 11_000 - smaller) for smaller in (0, matrix))
    assert here is not None
    assert less is not None
    assert 0 < less.rank < here.rank


def test_ranks_by_share_and_by_role() -> None:
    model = job_of("llama-9m").model
    assert rank_share({"attention": 16, "mlp": 32}, model) == 16 / 128
    asked = {"method": "galore", "rank": {"attention": 8, "mlp.down": 24, "mlp": 16}}
    choice = found(job_of("llama-9m", optimizer=asked), 900)
    assert choice is not None
    assert choice.rank == {"attention": 8, "mlp.down": 24, "mlp": 16}


@pytest.mark.slow
def test_a_batch_that_nobody_gave_becomes_smaller_and_the_first_note_says_so() -> None:
    """A given one never does."""
    config = Config.model_validate({"model": "llama-9m", "optimizer": {"method": "adamw"}})
    card = find_card("1050MiB", "cuda")

    def sized(rows: int) -> tuple[Config, list[str]]:
        train = config.train.model_copy(update={"batch": f"{rows}seq", "recompute": "full"})
        return settle(config.model_copy(update={"train": train}), cuda=True)

    rows = 4096
    settled, notes = sized(rows)
    given = settled.model_copy(
        update={"train": settled.train.model_copy(update={"update": "fused"})}
    )

    def fused(count: int) -> tuple[Config, list[str]]:
        less, said = sized(count)
        return less.model_copy(
            update={"train": less.train.model_copy(update={"update": "fused"})}
        ), said

    assert not make_plan(given, card, notes).fits
    plan = make_plan(given, card, notes, fused)
    assert plan.fits
    tokens = plan.choice.micro_batch * plan.choice.accumulate
    assert tokens < rows
    assert plan.notes[0].startswith(f"batch {tokens}seq instead of {rows}")
    assert plan.departures == plan.notes[:1]


@pytest.mark.slow
def test_any_card_and_model_get_a_plan_whose_rehearsal_fits() -> None:
    draw = random.Random(0)
    for _ in range(60):
        gpu, model = f"{draw.uniform(0.9, 6):.2f}GiB", draw.choice(["llama-9m", "llama-60m"])
        batch = f"{draw.choice([1, 8, 100])}seq"
        config = Config.model_validate({"model": model, "gpu": gpu, "train": {"batch": batch}})
        settled, notes = settle(config, cuda=True)
        plan = make_plan(settled, find_card(gpu, "cuda"), notes)
        if plan.fits:
            assert plan.memory.reserved <= plan.card.usable_bytes
        else:
            assert model == "llama-60m"
