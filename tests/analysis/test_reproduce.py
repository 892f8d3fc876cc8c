"""What a shortened run is, and verdicts on runs that somebody might have made."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowmem.analysis.reproduce import (
    CHANGED,
    MATCH,
    NO_MATCH,
    NOTHING,
    SHORTENED,
    VERDICT,
    Read,
    Verdict,
    begin,
    begun,
    published_of,
    shortened,
    verdict,
)
from lowmem.config.defaults import settle
from lowmem.config.load import load
from lowmem.config.recipes import find_recipe, recipes
from lowmem.errors import CheckpointError, ConfigError
from lowmem.train.run import Run

WHOLE_C4 = Read(True, 6_000_000, "t5-base")


def finished(
    tmp_path: Path,
    recipe: str = "galore-60m",
    published: float | None = 34.88,
    true: float = 35.6,
    events: tuple[dict[str, Any], ...] = (),
    tokens: int = 10_000_100,
    **given: str,
) -> Run:
    """A run folder of a recipe with these last perplexities; given: settings, "." as "_"."""
    flags = {key.replace("__", "."): value for key, value in given.items()}
    config, _ = settle(
        load({"recipe": recipe, "run.out": str(tmp_path), **flags}).config, cuda=True
    )
    run = Run.create(config, None)
    updates = run.config.train.updates
    assert isinstance(updates, int)
    line = {"update": updates - 1, "eval_loss": math.log(true), "eval_tokens": tokens}
    if published is not None:
        line["published_loss"] = math.log(published)
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run.folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return run


def judged(run: Run, read: Read = WHOLE_C4, given: tuple[str, ...] = ()) -> Verdict:
    return verdict(run, read, given)


@pytest.mark.parametrize(
    ("published", "word"),
    [(34.88, MATCH), (35.22, MATCH), (34.54, MATCH), (35.24, NO_MATCH), (34.52, NO_MATCH)],
)
def test_a_whole_run_matches_within_one_percent(
    tmp_path: Path, published: float, word: str
) -> None:
    """34.88 +- 0.3488, GaLore at 60M; the papers' way to evaluate is what counts."""
    found = judged(finished(tmp_path, published=published, true=99.0))
    assert found.verdict == word
    assert (found.published, found.tolerance) == (34.88, pytest.approx(0.3488))
    assert found.measured == pytest.approx(published)
    assert found.true_perplexity == pytest.approx(99.0)
    assert found.deviations == list(find_recipe("galore-60m").differs)


def test_the_true_perplexity_is_compared_where_the_publication_counts_right(
    tmp_path: Path,
) -> None:
    """FRUGAL's trainer divides by the number of batches; 23.59 at 60M."""
    found = judged(finished(tmp_path, recipe="frugal-60m", published=23.1, true=23.6))
    assert (found.published, found.verdict) == (23.59, MATCH)
    assert found.measured == found.true_perplexity == pytest.approx(23.6)
    rerun = judged(finished(tmp_path, recipe="frugal-60m-c4", published=34.9, true=35.6))
    assert (rerun.published, rerun.measured) == (34.91, pytest.approx(34.9))


@pytest.mark.parametrize(
    ("given", "word", "named"),
    [
        ({"train__updates": "9999"}, SHORTENED, "train.updates = 9,999, the recipe has 10,000"),
        ({"train__batch": "8seq"}, SHORTENED, "train.batch = 8seq, the recipe has 512seq"),
        ({"evaluate__tokens": "1M"}, SHORTENED, "evaluate.tokens = 1,000,000"),
        ({"train__updates": "20000"}, CHANGED, "train.updates = 20,000"),
        ({"optimizer__rank": "64"}, CHANGED, "optimizer.rank = 64, the recipe has 128"),
        ({"data__protocol": "lowmem"}, CHANGED, "data.protocol = lowmem"),
        ({"model": "llama-9m"}, CHANGED, "model: not llama-60m"),
        ({"train__weights": "fp32"}, CHANGED, "train.weights = fp32, the recipe has bf16"),
        ({"optimizer__options__side": "left"}, CHANGED, "optimizer.options.side = left"),
        ({"train__seed": "1"}, MATCH, "train.seed = 1, the recipe has 0"),
        ({"train__micro_batch": "8", "checkpoint__every": "5"}, MATCH, None),
    ],
)
def test_every_setting_that_is_another_is_listed_and_weighed(
    tmp_path: Path, given: dict[str, str], word: str, named: str | None
) -> None:
    keys = tuple(key.replace("__", ".") for key in given)
    settings: dict[str, Any] = dict(given)
    found = judged(finished(tmp_path, **settings), given=keys)
    assert found.verdict == word
    own = found.deviations[: len(found.deviations) - len(find_recipe("galore-60m").differs)]
    if named is None:
        assert own == []
    else:
        assert any(line.startswith(named) for line in own)


def test_other_text_is_no_reproduction(tmp_path: Path) -> None:
    run = finished(tmp_path, data__source="/texts", data__tokenizer="/tokenizers/t5-base")
    assert judged(run).verdict == MATCH  # a copy of the whole of C4
    found = judged(run, Read(False, 1_000_000, "t5-base"))
    assert found.verdict == CHANGED
    assert "data.source = /texts, the recipe has c4" in found.deviations
    assert "1,000,000 documents are read 5.1 times" in found.deviations
    other = judged(run, Read(True, None, "gpt2"))
    assert other.verdict == CHANGED
    assert "data.tokenizer = /tokenizers/t5-base, the recipe has t5-base" in other.deviations


def test_what_happened_in_the_run_is_listed(tmp_path: Path) -> None:
    events = ({"event": "skipped"}, {"event": "saved"}, {"event": "rolledback"})
    run = finished(tmp_path, events=events, tokens=2_000_000, train__update="fused+subspace")
    found = judged(run, given=("train.update",))
    assert found.verdict == MATCH
    told = "\n".join(found.deviations)
    assert "2 updates were skipped or rolled back" in told
    assert "2,000,000 target tokens alone" in told
    assert "first micro-batch" in told


def test_nothing_is_compared_where_nothing_is_published(tmp_path: Path) -> None:
    found = judged(finished(tmp_path, recipe="galore-1b-script"))
    assert (found.verdict, found.published, found.tolerance) == (NOTHING, None, None)


def test_an_unfinished_run_has_no_verdict(tmp_path: Path) -> None:
    run = finished(tmp_path)
    (run.folder / "metrics.jsonl").write_text('{"update": 5, "eval_loss": 3.0, "eval_tokens": 9}\n')
    with pytest.raises(CheckpointError, match="no evaluation after its last update"):
        judged(run)


def test_the_verdict_is_a_file_that_others_read(tmp_path: Path) -> None:
    run = finished(tmp_path)
    judged(run).write(run.folder)
    told = json.loads((run.folder / VERDICT).read_text())
    assert {*told} >= {"recipe", "published", "measured", "tolerance", "verdict", "deviations"}
    assert (told["recipe"], told["verdict"]) == ("galore-60m", "match")


def test_everything_shrinks_alike() -> None:
    config = shortened(load({"recipe": "galore-60m"}, environ={}), 0.1)
    assert (config.train.updates, config.optimizer.options["gap"]) == (1000, 20)
    assert (config.evaluate.every, config.evaluate.tokens, config.evaluate.batch) == (
        *(100, 1_000_000, 26),
    )
    assert config.schedule.warmup == 0.1  # a share already
    assert shortened(load({"recipe": "frugal-60m"}, environ={}), 0.1).schedule.cycle == 1000
    tiny = shortened(load({"recipe": "galore-60m"}, environ={}), 1e-9)
    assert (tiny.train.updates, tiny.optimizer.options["gap"], tiny.schedule.cycle) == (1, 1, 0)
    tokens = shortened(load({"recipe": "cosmos-130m"}, environ={}), 0.001).train.tokens
    assert tokens == 5_000_000


def test_what_the_user_gave_does_not_shrink() -> None:
    given = {"recipe": "galore-60m", "optimizer.options.gap": "7", "train.updates": "300"}
    config = shortened(load(given, environ={}), 0.1)
    assert (config.train.updates, config.optimizer.options["gap"]) == (300, 7)
    assert config.evaluate.every == 100


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, math.nan])
def test_no_other_scales(scale: float) -> None:
    with pytest.raises(ConfigError, match="--scale"):
        shortened(load({"recipe": "galore-60m"}, environ={}), scale)


def test_only_the_same_command_goes_on(tmp_path: Path) -> None:
    assert begun(tmp_path / "none", {"recipe": "galore-60m"}) is None
    run = finished(tmp_path)
    with pytest.raises(ConfigError, match="begun by another command"):
        begun(run.folder, {"recipe": "galore-60m"})
    begin(run.folder, {"recipe": "galore-60m", "scale": 0.1})
    found = begun(run.folder, {"recipe": "galore-60m", "scale": 0.1})
    assert found is not None
    assert found.folder == run.folder
    with pytest.raises(ConfigError, match="begun by another command"):
        begun(run.folder, {"recipe": "galore-60m", "scale": 0.2})


def test_figures_of_the_papers_stand_beside_their_recipes() -> None:
    """A few as printed: GaLore Table 2, APOLLO Tables 2 and 3, Fira Table 3, FRUGAL Table 2."""
    printed = {
        "galore-60m": 34.88,
        "adamw-60m": 34.06,
        "adamw-1b": 15.56,
        "galore-7b": 14.65,
        "apollo-130m": 22.94,
        "apollo-1b": 14.20,
        "apollo-1b-script": 14.25,
        "apollo-mini-60m-tuned": 30.95,
        "apollo-7b": 13.02,
        "fira-1b": 14.31,
        "frugal-350m": 14.79,
        "frugal-60m-c4": 34.91,
        "frugal-1b-density0": 12.63,
        "cosmos-130m": 20.54,
        "q-galore-1b": 16.25,
        "adamw-350m-1024": 16.30,
    }
    found = {name: published_of(find_recipe(name)) for name in printed}
    assert {name: row and row.ppl for name, row in found.items()} == printed
    compared = [recipe for recipe in recipes() if published_of(recipe) is not None]
    assert len(compared) > 60
