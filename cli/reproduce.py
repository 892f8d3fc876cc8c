"""`lowmem reproduce`: run a recipe, whole or shortened, and say whether it met the publication."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.analysis.report import write_report
from lowmem.analysis.reproduce import (
    MATCH,
    NO_MATCH,
    Read,
    Verdict,
    begin,
    begun,
    published_of,
    shortened,
    verdict,
)
from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import loaded, planned, require_fit
from lowmem.cli.train import checked_corpus, corpus_of, trained
from lowmem.config.load import Loaded, flatten
from lowmem.config.recipes import Recipe, find_recipe, recipes
from lowmem.config.schema import Config
from lowmem.config.toml import toml_value
from lowmem.errors import ConfigError
from lowmem.planner.plan import Plan
from lowmem.train.run import Run
from lowmem.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from lowmem.data.shards import Corpus

LIST = "list"
_C4_FILES = "-of-01024.json.gz"  # of the training part of allenai/c4


@dataclass(frozen=True)
class Asked:
    """scale: share of the run. budget: time for it instead, e.g. "30min". dry: plan, no more."""

    scale: float | None
    budget: str | None
    dry: bool


def reproduce(given: Given, name: str, asked: Asked, *, as_json: bool) -> None:
    """Run, or continue, the recipe of that name, and print the verdict."""
    console = Console(quiet=given.quiet, verbose=given.verbose)
    if name == LIST:
        _list(console, as_json=as_json)
        return
    recipe = find_recipe(name)
    found = loaded(_with_recipe(given, recipe), console)
    settings = _given(found)
    command: dict[str, object] = {"recipe": recipe.name, "given": settings}
    command |= {"scale": asked.scale, "budget": asked.budget}
    folder = Path(found.config.run.out) / (found.config.run.name or _folder_name(recipe, asked))
    if recipe.note:
        console.say(f"{recipe.name}: {recipe.note}")
    run = begun(folder, command)
    if run is None:
        plan = _shown_plan(found, asked, folder.name, console, as_json=as_json)
        if asked.dry:
            return
        corpus = checked_corpus(plan, console)
        run = Run.create(plan.config, plan.to_json())
        begin(run.folder, command)
        trained(run, corpus, console, plan)
    else:
        console.say(f"{folder} was begun by the same command and goes on")
        if asked.dry:
            return
        corpus = corpus_of(run.config, console)
        trained(run, corpus, console)
    result = verdict(run, _read(corpus), settings)
    result.write(run.folder)
    console.say(f"report {write_report(run.folder)}")
    _show(console, result, run.folder, as_json=as_json)


def _with_recipe(given: Given, recipe: Recipe) -> Given:
    flags = {**given.flags, "recipe": recipe.name}
    return Given(flags, given.files, given.assignments, given.quiet, given.verbose)


def _given(found: Loaded) -> dict[str, str]:
    """Key -> value, as text, of what the user set by flag, variable or file."""
    return {
        key: str(value)
        for key, value in flatten(found.config.model_dump())
        if not found.origins[key].startswith(("default", "recipe "))
        and not key.startswith(("run.", "recipe"))
    }


def _folder_name(recipe: Recipe, asked: Asked) -> str:
    if asked.budget is not None:
        return f"{recipe.name}-{asked.budget}"
    return recipe.name if asked.scale is None else f"{recipe.name}-x{asked.scale:g}"


def _shown_plan(found: Loaded, asked: Asked, name: str, console: Console, *, as_json: bool) -> Plan:
    """The plan, shown; PlanError: it does not fit."""
    plan = _plan(found, asked, name, console)
    console.plan(plan, as_result=asked.dry and not as_json)
    if asked.dry and as_json:
        console.json(plan.to_json())
    require_fit(plan)
    return plan


def _plan(found: Loaded, asked: Asked, name: str, console: Console) -> Plan:
    """The plan of the run, shortened as asked. ConfigError: no such scale or budget."""
    if asked.scale is not None and asked.budget is not None:
        raise ConfigError(
            "--scale and --budget exclude one another",
            "a budget of time chooses the scale",
            "leave out one of them",
        )
    seconds = None if asked.budget is None else _seconds(asked.budget)
    scale = 1.0 if asked.scale is None else asked.scale
    plan = planned(_named(shortened(found, scale), name), for_this_machine=True)
    if seconds is not None:
        require_fit(plan)
        scale = _scale_for(plan, seconds, console)
        plan = planned(_named(shortened(found, scale), name), for_this_machine=True)
    if scale < 1.0:
        console.say(
            f"shortened to {scale:.3g} of the published run: its figures compare with nothing"
        )
    return plan


def _seconds(budget: str) -> float:
    try:
        return parse_seconds(budget)
    except ValueError as error:
        raise ConfigError(f"--budget {budget}", str(error), "--budget 30min") from None


def _named(config: Config, name: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def _scale_for(plan: Plan, seconds: float, console: Console) -> float:
    """The share of the run that this machine does in that time, by two measured updates."""
    from lowmem.train.build import require_hardware
    from lowmem.train.timing import measured_pace, scale_for

    require_hardware(plan.config)
    with console.work("measuring two updates"):
        shrinks, fixed = measured_pace(plan.config).whole(plan.config, plan.choice)
    console.say(f"the whole run would take {format_seconds(shrinks + fixed)} on this machine")
    scale = scale_for(seconds, shrinks, fixed)
    updates = plan.config.train.updates
    if not isinstance(updates, int) or scale * updates < 1.0:
        least = format_seconds(fixed + shrinks / (updates if isinstance(updates, int) else 1))
        raise ConfigError(
            f"--budget {format_seconds(seconds)} is too short for one update",
            f"one update and its refreshes take {least} on this machine",
            "a larger --budget, or a smaller --batch, e.g. --batch 8seq",
        )
    return scale


def _read(corpus: "Corpus") -> Read:
    """What the run has read, from the manifest of its corpus."""
    source = corpus.manifest["source"]
    files = [one["name"] for one in source.get("inputs", [])]
    whole = sum(name.endswith(_C4_FILES) for name in files) == 1024
    documents = None
    if corpus.row_tokens is not None and corpus.train is not None:
        documents = corpus.train.documents
    return Read(source["kind"] == "c4" or whole, documents, corpus.manifest["tokenizer"]["name"])


def _show(console: Console, result: Verdict, folder: Path, *, as_json: bool) -> None:
    if as_json:
        console.json({"schema_version": 1, "folder": str(folder), **asdict(result)})
        return
    console.result(f"{folder}: {result.verdict}")
    if result.published is not None and result.tolerance is not None:
        console.result(
            f"  published  {result.published:.2f} +- {result.tolerance:.2f}  {result.source}"
        )
    else:
        console.result(f"  published  no figure of these settings; {result.source}")
    console.result(f"  measured   {result.measured:.5g}  by the publication's way to evaluate")
    console.result(f"  true       {result.true_perplexity:.5g}  every token counted once")
    if result.verdict in (MATCH, NO_MATCH) and result.published is not None:
        apart = result.measured / result.published - 1
        console.result(f"  apart      {apart:+.2%}")
    console.result("  done in another way:")
    for deviation in result.deviations:
        console.result(f"    {deviation}")


def _list(console: Console, *, as_json: bool) -> None:
    rows = [(recipe, published_of(recipe)) for recipe in recipes()]
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "recipes": [
                    {
                        **asdict(recipe),
                        "published_perplexity": None if row is None else row.ppl,
                        "mark": None if row is None else row.mark,
                    }
                    for recipe, row in rows
                ],
            }
        )
        return
    columns = ["recipe", "benchmark", ">updates", ">perplexity", "source"]
    console.table(
        columns,
        [
            [
                recipe.name,
                recipe.protocol,
                _length(recipe),
                "-" if row is None else f"{row.ppl:.2f}",
                recipe.source if row is None else row.source,
            ]
            for recipe, row in rows
        ],
    )
    console.say("\nlowmem config show --recipe NAME shows the settings of one")


def _length(recipe: Recipe) -> str:
    train = recipe.settings["train"]
    if "updates" in train:
        return f"{train['updates']:,}"
    return f"{toml_value(train['tokens'])} tokens".replace('"', "")
