"""Reproducing a publication: how a recipe is shortened, and the verdict on what came out.

    shortened(load({"recipe": "galore-60m"}), 0.1)    1,000 updates, a tenth of everything else
    verdict(run, read, given)                         34.6 against 34.88 +- 0.35: match

A figure is compared only after the whole of the published run. Everything that was done in another
way is listed, what lowmem does otherwise by itself included.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.config.defaults import rows_of, settle
from lowmem.config.load import Loaded, flatten, load
from lowmem.config.presets import resolve_model
from lowmem.config.recipes import Recipe, find_recipe
from lowmem.config.schema import Config, settled
from lowmem.data.cache import write_whole
from lowmem.errors import CheckpointError, ConfigError, command_line
from lowmem.planner.quality import Evidence, published_row
from lowmem.train.events import perplexity
from lowmem.train.run import Run
from lowmem.units import parse_batch

TOLERANCE = 0.01
"""Of a perplexity. Reruns of the same settings by others differ by about as much: GaLore at 60M is
34.88 in its paper and 34.58 in arXiv:2506.16659."""

SHORTENED, CHANGED = "shortened: not comparable", "changed: not comparable"
MATCH, NO_MATCH, NOTHING = "match", "no match", "nothing published"

VERDICT = "verdict.json"
_BEGUN = "reproduce.json"  # what the command was that made the run

_LENGTHS = (  # what --scale makes smaller
    "train.updates",
    "train.tokens",
    "schedule.warmup",
    "schedule.cycle",
    "optimizer.options.gap",
    "evaluate.every",
    "evaluate.tokens",
    "evaluate.batch",
)
_NEVER_BELOW_ONE = ("schedule.warmup", "schedule.cycle")  # 0 is a setting of its own there
_SHORTER = ("train.updates", "train.batch", "evaluate.tokens")
_LESS = "less"  # stands for the key of a difference that shortens the run
_SAME_RESULT = {  # settings that change memory or speed, and not what is computed
    *("gpu", "others", "recipe", "data.skip_bad", "train.micro_batch", "train.update"),
    *("train.recompute", "train.logits", "train.attention", "train.device", "train.hours"),
}
_COMPARABLE = ("train.seed", "evaluate.every")
"""Other values of these do not end a comparison."""


@dataclass(frozen=True)
class Read:
    """What a run has read. is_c4: whole C4. documents: of the training part, None where packed.

    tokenizer: its name. eval_tokens: of the last evaluation.
    """

    is_c4: bool
    documents: int | None
    tokenizer: str


@dataclass(frozen=True)
class Verdict:
    """published, measured: perplexities, the latter by the publication's way to evaluate.

    true_perplexity: of the same losses, every token counted once. tolerance: around `published`.
    """

    recipe: str
    source: str
    published: float | None
    measured: float
    true_perplexity: float
    tolerance: float | None
    verdict: str
    deviations: list[str]

    def write(self, folder: Path) -> None:
        """To the file that `report` reads."""
        write_whole(folder / VERDICT, json.dumps(asdict(self), indent=1).encode() + b"\n")


def published_of(recipe: Recipe) -> Evidence | None:
    """The published result of a recipe, None where there is none."""
    if recipe.published is None:
        return None
    rank = recipe.settings["optimizer"].get("rank")
    hidden = resolve_model(recipe.settings["model"], Path.cwd()).hidden_size
    share = rank / hidden if isinstance(rank, int) else rank
    return published_row(recipe.published, recipe.method, recipe.size, recipe.variant, share)


def shortened(loaded: Loaded, scale: float) -> Config:
    """The configuration with a recipe's lengths times `scale`; what a user gave stays.

    Updates, warm-up, cycle, gap, evaluations and their batches shrink alike, so that the run has
    as many refreshes and evaluations as the whole one. ConfigError: no such scale.
    """
    if not 0.0 < scale <= 1.0:
        raise ConfigError(
            f"--scale {scale:g}",
            "the run is shortened to this share: above 0, and 1 is the whole run",
            "--scale 0.1",
        )
    config = loaded.config
    if scale == 1.0:
        return config
    tables = config.model_dump()
    for key, value in list(flatten(tables)):
        if key in _LENGTHS and loaded.origins[key].startswith("recipe ") and type(value) is int:
            least = 0 if key in _NEVER_BELOW_ONE and value == 0 else 1
            _put(tables, key, max(least, round(value * scale)))
    return Config.model_validate(tables)


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        tables = tables[part]
    tables[name] = value


def begin(folder: Path, command: Mapping[str, object]) -> None:
    """Note what the run was made by, so that the same command continues it."""
    write_whole(folder / _BEGUN, json.dumps(command, indent=1).encode() + b"\n")


def begun(folder: Path, command: Mapping[str, object]) -> Run | None:
    """The run that the same command has begun, None if there is none.

    ConfigError: the folder is of another command.
    """
    if not os.path.exists(folder):
        return None
    try:
        told = json.loads((folder / _BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = None
    if told != command:
        raise ConfigError(
            f"the run folder {folder} exists and was begun by another command",
            f"{_BEGUN} in it says: {json.dumps(told)}" if told else f"it has no {_BEGUN}",
            "the same command continues it; --name or --out chooses another folder",
        )
    return Run.open(folder)


def verdict(run: Run, read: Read, given: Collection[str]) -> Verdict:
    """What came out, beside what was published. given: keys that the user set.

    CheckpointError: the run is not finished.
    """
    recipe = find_recipe(run.config.run.recipe)
    last = _last_evaluation(run)
    published = published_of(recipe)
    differences = list(_differences(run, recipe, read, given))
    true = perplexity(last["eval_loss"])
    biased = None if recipe.counts_right else last.get("published_loss")
    measured = true if biased is None else perplexity(biased)
    value = None if published is None else published.ppl
    return Verdict(
        recipe=recipe.name,
        source=recipe.source if published is None else published.source,
        published=value,
        measured=measured,
        true_perplexity=true,
        tolerance=None if value is None else TOLERANCE * value,
        verdict=_word(measured, value, {key for key, _ in differences}),
        deviations=[
            *(sentence for _, sentence in differences),
            *_of_the_run(run, read, last["eval_tokens"]),
            *recipe.differs,
        ],
    )


def _word(measured: float, published: float | None, different: Collection[str]) -> str:
    if _LESS in different:
        return SHORTENED
    if any(key not in _COMPARABLE for key in different):
        return CHANGED
    if published is None:
        return NOTHING
    return MATCH if abs(measured - published) <= TOLERANCE * published else NO_MATCH


def _last_evaluation(run: Run) -> dict[str, Any]:
    updates = settled(run.config.train.updates)
    for line in reversed(run.metrics()):
        if "eval_loss" in line and line["update"] == updates - 1:
            return line
    raise CheckpointError(
        f"{run.folder} has no evaluation after its last update",
        f"{updates} updates were asked for",
        command_line("resume", run.folder),
    )


def _differences(
    run: Run, recipe: Recipe, read: Read, given: Collection[str]
) -> Iterator[tuple[str, str]]:
    """(key, sentence) for every setting that is not the recipe's."""
    whole = load({"recipe": recipe.name}, environ={}).config
    whole, _ = settle(whole, cuda=run.config.train.device == "cuda")
    wanted, used = dict(flatten(whole.model_dump())), dict(flatten(run.config.model_dump()))
    if resolve_model(whole.model, Path.cwd()) != run.config.model:
        yield "model", f"model: not {whole.model}"
    for key, value in wanted.items():
        if key == "model" or _changes_nothing(key) or value in ("auto", None, {}):
            continue
        now = used.get(key)
        if now != value and not _is_same(key, read):
            less = key in _SHORTER and _amount(now) < _amount(value)
            sentence = f"{key} = {_shown(now)}, the recipe has {_shown(value)}"
            yield (_LESS if less else key), sentence
    for key in given:
        is_open = key != "model" and wanted.get(key) in ("auto", None, {})
        if is_open and not _changes_nothing(key):
            yield key, f"{key} = {_shown(used.get(key))}, the recipe leaves it open"
    if not read.is_c4:
        yield "text", "the text is not the whole of C4"


def _changes_nothing(key: str) -> bool:
    return key in _SAME_RESULT or key.startswith(("run.", "checkpoint."))


def _amount(value: Any) -> int:
    """A number, or that of "512seq"."""
    return value if isinstance(value, int) else parse_batch(str(value))[0]


def _is_same(key: str, read: Read) -> bool:
    """Is the other value of a path another way to the same thing?"""
    if key == "data.source":
        return read.is_c4
    return key == "data.tokenizer" and read.tokenizer == "t5-base"


def _of_the_run(run: Run, read: Read, eval_tokens: int) -> Iterator[str]:
    """What happened, apart from settings."""
    config = run.config
    rows = rows_of(config.train.batch, settled(config.data.seq_len))
    needed = rows * settled(config.train.updates)
    if read.documents is not None and read.documents < needed:
        yield f"{read.documents:,} documents are read {needed / read.documents:.1f} times"
    if eval_tokens < 0.99 * settled(config.evaluate.tokens):
        yield f"the validation part has {eval_tokens:,} target tokens alone"
    if config.train.update == "fused+subspace":
        yield "subspaces are chosen from the first micro-batch of an update (fused+subspace)"
    skipped = [e for e in run.events() if e.get("event") in ("skipped", "rolledback")]
    if skipped:
        yield f"{len(skipped)} updates were skipped or rolled back as spikes or not finite"


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)
