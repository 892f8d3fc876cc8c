"""`lowmem sweep`: settings times seeds, one run after the other, and what came of them.

FOLDER/trials/NAME.toml   what trial NAME was asked to be
FOLDER/trials/NAME.log    what its process said
FOLDER/NAME               its run, like any other
FOLDER/failed.jsonl       which ended with an error

A trial is `lowmem train --config FOLDER/trials/NAME.toml` in a process of its own, so that none
leaves memory behind for the next; one that was begun goes on by `lowmem resume`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem.analysis.compare import Comparison, compared
from lowmem.analysis.history import History
from lowmem.analysis.sweep import Request, Trial, read_request, requested, seeds_of, trials
from lowmem.cli.compare import show
from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.sweep_forecast import Forecast, forecasts, kind_of
from lowmem.cli.sweep_process import run_trial, why_it_ended
from lowmem.config.flags import FLAGS
from lowmem.config.load import flatten, load
from lowmem.config.schema import Config
from lowmem.config.toml import to_toml
from lowmem.data.cache import write_whole
from lowmem.errors import CheckpointError, ConfigError, LowMemError, PlanError, Stopped, short
from lowmem.train.guard import StopRequest, stop_requests
from lowmem.train.lock import held, holder_of
from lowmem.units import format_bytes, format_seconds, format_span

DIVERGED = 6  # exit code; such a trial would diverge again, bit for bit


@dataclass(frozen=True)
class Asked:
    """file: a sweep in TOML, instead of flags with several values."""

    file: Path | None
    seeds: str | None
    dry_run: bool


@dataclass
class Outcome:
    """Where a trial stands: finished, begun, new, refused, failed or diverged."""

    trial: Trial
    config: Config
    forecast: Forecast = field(default_factory=Forecast)
    state: str = "new"
    why: str = ""
    code: int = 0

    @property
    def is_left(self) -> bool:
        return self.state in ("new", "begun")


def sweep(given: Given, asked: Asked, *, as_json: bool) -> None:
    """Plan all trials, run what is left of them, and compare; the first failure's exit code."""
    console = Console(quiet=given.quiet, verbose=given.verbose)
    request, folder = _request(given, asked)
    outcomes = [_of(trial, request, given, folder) for trial in _trials(request)]
    _require_as_before(outcomes, folder)
    for outcome in outcomes:
        _look_up(outcome, folder)
    alone = "" if len(outcomes) > 1 else ", for nothing is varied: no setting and no seed"
    console.say(f"{folder}: {_trials_in_words(len(outcomes))}{alone}")
    _forecast(outcomes, console)
    _show_plan(outcomes, console)
    if asked.dry_run:
        if as_json:
            console.json(_record(folder, outcomes, None))
        return
    left = [o for o in outcomes if o.is_left]
    if not left and all(o.state == "refused" for o in outcomes):
        first = outcomes[0]
        raise PlanError(
            "none of the trials can run", f"{first.trial.name}: {first.why}", "other settings"
        )
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    with held(folder), stop_requests(folder) as stop:
        for outcome in outcomes:
            _write_request(outcome, folder)
        for number, outcome in enumerate(left, start=1):
            _run(outcome, folder, stop, console, f"{number}/{len(left)}")
            if stop:
                raise _stopped(stop, outcomes, folder)
    _show_end(outcomes, folder, console, as_json=as_json)


def _request(given: Given, asked: Asked) -> tuple[Request, Path]:
    """What is asked, and the folder of the sweep."""
    if FLAGS["--seed"] in given.flags:
        raise ConfigError("--seed in a sweep", "every setting is tried with several", "--seeds 3")
    if asked.file is None:
        request = requested(given.flags, asked.seeds)
    else:
        request = read_request(asked.file)
        varied = {key for grid in request.grids for key in grid}
        twice = sorted(varied & given.flags.keys())
        if twice:
            raise ConfigError(
                f"{twice[0]} is varied by {asked.file} and given as a flag",
                "the trials would not be those of the file",
                "leave the flag out, or edit the file",
            )
        seeds = request.seeds if asked.seeds is None else seeds_of(asked.seeds, "--seeds")
        request = replace(request, seeds=seeds, settings=request.settings | given.flags)
    out = request.settings.pop(FLAGS["--out"], "runs")
    default = "sweep" if asked.file is None else asked.file.stem
    return request, Path(out) / str(request.settings.pop(FLAGS["--name"], default))


def _trials(request: Request) -> list[Trial]:
    from lowmem.optim.assign import takes_rank  # imports torch

    return trials(request, takes_rank)


def _trials_in_words(count: int) -> str:
    return "1 trial" if count == 1 else f"{count} trials"


def _of(trial: Trial, request: Request, given: Given, folder: Path) -> Outcome:
    """The trial with its configuration: that of `lowmem train` with the same flags."""
    place = {FLAGS["--name"]: trial.name, FLAGS["--out"]: str(folder)}
    varied = dict(pair for key, value in trial.varied.items() for pair in flatten(value, key))
    flags = request.settings | varied | place
    return Outcome(trial, load(flags, given.files, os.environ, given.assignments).config)


def _require_as_before(outcomes: Sequence[Outcome], folder: Path) -> None:
    """ConfigError: a trial of that name was something else when the sweep was begun."""
    for outcome in outcomes:
        path = folder / "trials" / f"{outcome.trial.name}.toml"
        if not path.is_file():
            continue
        before, now = (
            dict(flatten(config.model_dump()))
            for config in (load({}, [path], {}).config, outcome.config)
        )
        other = [key for key in before | now if before.get(key) != now.get(key)]
        if other:
            raise ConfigError(
                f"{folder} holds another sweep",
                f"trial {outcome.trial.name} had {other[0]} = {before.get(other[0])!r}, now it is "
                f"{now.get(other[0])!r}",
                "--name with another name, or the settings as they were",
            )


def _write_request(outcome: Outcome, folder: Path) -> None:
    text = to_toml(outcome.config).encode()
    write_whole(folder / "trials" / f"{outcome.trial.name}.toml", text)


def _look_up(outcome: Outcome, folder: Path) -> None:
    """Where the trial stands by its folder and by what failed before."""
    run = folder / outcome.trial.name
    if not (run / "config.toml").is_file():
        return
    failed = _failed(folder).get(outcome.trial.name)
    history = History.read(run)
    if history.finished is not None:
        outcome.state = "finished"
    elif failed is not None and failed.get("code") == DIVERGED:
        outcome.state, outcome.why, outcome.code = "diverged", str(failed.get("why")), DIVERGED
    else:
        outcome.state = "begun"


def _failed(folder: Path) -> dict[str, dict[str, Any]]:
    """The last failure of each trial."""
    try:
        lines = (folder / "failed.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return {record["trial"]: record for record in records}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'failed.jsonl'} cannot be read",
            short(str(error), 200),
            "remove it: trials that failed are then tried again",
        ) from None


def _forecast(outcomes: Sequence[Outcome], console: Console) -> None:
    """Plan every trial that is not over; those that differ in seed and rate have one plan."""
    todo = [outcome for outcome in outcomes if outcome.is_left]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in todo:
        kinds.setdefault(kind_of(outcome.config), []).append(outcome)
    with console.work("plan") as progress:
        made = forecasts([group[0].config for group in kinds.values()])
        for number, (group, forecast) in enumerate(zip(kinds.values(), made, strict=True), start=1):
            progress(number, len(kinds), group[0].trial.name)
            for outcome in group:
                outcome.forecast = forecast
                if forecast.refused and outcome.state == "new":
                    outcome.state, outcome.why = "refused", forecast.refused


def _show_plan(outcomes: Sequence[Outcome], console: Console) -> None:
    """A line for each trial, and the time of those that are left."""
    if console.quiet:
        return
    for outcome in outcomes:
        words = outcome.why
        if outcome.is_left:
            seconds = outcome.forecast.seconds
            time = "time not known" if seconds is None else f"about {format_span(seconds)}"
            words = f"{format_bytes(outcome.forecast.peak)}, {time}"
        console.say(f"  {outcome.state:8} {outcome.trial.name}  {words}")
    left = [o for o in outcomes if o.is_left]
    known = [o.forecast.seconds for o in left if o.forecast.seconds is not None]
    total = format_span(sum(known)) if known else "an unknown time: no rates of this device"
    beside = "" if len(known) in (0, len(left)) else f" for {len(known)} of them"
    if left:
        console.say(f"{_trials_in_words(len(left))} to run, {total}{beside}, without evaluation")


def _run(outcome: Outcome, folder: Path, stop: StopRequest, console: Console, place: str) -> None:
    """Run one trial to its end, or until the sweep is asked to stop."""
    name, run = outcome.trial.name, folder / outcome.trial.name
    if holder_of(run) is not None:
        raise CheckpointError(
            f"{run} is in use by process {holder_of(run)}",
            "a trial of this sweep is still going on",
            f"wait for it, or end it: touch {run / 'STOP'}",
        )
    _look_up(outcome, folder)  # again: the trial of a killed sweep lives on and may have come here
    if outcome.state == "finished":
        return
    if outcome.state == "begun":
        arguments = ["resume", str(run)]
    else:
        arguments = ["train", "--config", str(folder / "trials" / f"{name}.toml")]
    console.say(f"{place}  {name}: lowmem {' '.join(arguments)}")
    log = folder / "trials" / f"{name}.log"
    begun = log.stat().st_size if log.is_file() else 0
    code = run_trial(arguments, log, stop)
    if code == 0:
        outcome.state = "finished"
        history = History.read(run)
        console.say(
            f"{place}  {name}: perplexity {history.perplexity or float('nan'):.5g}, "
            f"{format_seconds(history.seconds)} of training"
        )
    elif not stop:
        outcome.code, outcome.why = code, why_it_ended(log, begun, code)
        outcome.state = "diverged" if code == DIVERGED else "failed"
        console.say(f"{place}  {name}: {outcome.state}: {outcome.why}")
        record = {"trial": name, "code": code, "why": outcome.why}
        with (folder / "failed.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _stopped(stop: StopRequest, outcomes: Sequence[Outcome], folder: Path) -> Stopped:
    done = sum(outcome.state == "finished" for outcome in outcomes)
    return Stopped(
        f"stopped by {stop.signal}; {done} of {len(outcomes)} trials are finished",
        f"the trial that was under way has saved, if it had begun to train; see {folder}",
        "the same command again",
    )


def _show_end(
    outcomes: Sequence[Outcome], folder: Path, console: Console, *, as_json: bool
) -> None:
    """The comparison of what was finished, the best settings, and what failed."""
    ran = [History.read(folder / o.trial.name) for o in outcomes if o.state == "finished"]
    comparison = compared([run.require_updates() for run in ran]) if ran else None
    if as_json:
        console.json(_record(folder, outcomes, comparison))
    elif comparison is not None:
        show(comparison, console)
        for line in best_lines(comparison, folder):
            console.result(line)
    over = [o for o in outcomes if o.state in ("refused", "diverged", "failed")]
    for outcome in over:
        console.say(f"{outcome.state}: {outcome.trial.name}: {outcome.why}")
    failed = [o for o in over if o.state == "failed"]
    if failed:
        kinds = {kind.exit_code: kind for kind in LowMemError.__subclasses__()}
        raise kinds.get(failed[0].code, LowMemError)(
            f"{len(failed)} of {len(outcomes)} trials failed",
            "\n".join(f"{o.trial.name}: {o.why}" for o in failed),
            f"see {folder / 'trials'}/*.log; the same command again tries them anew",
        )


def best_lines(comparison: Comparison, folder: Path) -> Iterator[str]:
    """The best setting of each method, the best of all first, and how to run it again."""
    seen = set()
    for setting in comparison.settings:
        method = setting.label["method"]
        if setting.perplexity is None or method in seen:
            continue
        seen.add(method)
        told = ", ".join(f"{key} {value}" for key, value in setting.label.items() if value != "-")
        file = folder / "trials" / f"{setting.runs[0].name}.toml"
        yield f"best {told}: perplexity {setting.perplexity.mean:.5g}"
        yield f"  lowmem train --config {file} --out runs --name {method}-best"


def _record(
    folder: Path, outcomes: Sequence[Outcome], comparison: Comparison | None
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "folder": str(folder),
        "trials": [
            {
                "name": o.trial.name,
                "settings": o.trial.varied,
                "state": o.state,
                "why": o.why,
                "code": o.code,
                "forecast": asdict(o.forecast),
            }
            for o in outcomes
        ],
        "comparison": None if comparison is None else comparison.to_json(),
    }
