"""Runs side by side: which differ only in their seeds, what may be compared, who is dominated.

comparison = compared([History.read(path) for path in paths])
comparison.settings        one row for each setting, best perplexity first
comparison.differences     what makes them unequal; empty: a fair comparison
comparison.to_json()
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowmem.analysis.history import History, Peak
from lowmem.analysis.published import published_beside
from lowmem.analysis.seeds import HOW, Interval, interval
from lowmem.config.defaults import rows_of
from lowmem.config.load import flatten
from lowmem.config.presets import resolve_model
from lowmem.config.schema import settled
from lowmem.planner.quality import Evidence
from lowmem.train.events import perplexity
from lowmem.units import format_count

SCHEMA_VERSION = 1
# Neither what is trained nor how well: names, places, the card, and when something is saved or
# looked at. The seed is what runs of one setting differ in.
_ASIDE = ("run.", "recipe", "checkpoint.", "gpu", "others", "evaluate.every", "train.seed")
# What a comparison must hold equal is told in words, not as a setting.
_TOLD = ("model", "data.", "protocol", "evaluate.", "train.updates", "train.batch", "train.device")
# Shown wherever runs differ in them, of other methods too: they change what a method reaches.
_SHOWN = ("train.weights", "train.clip", "optimizer.weight_decay")
_ABSENT = "none"


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their seeds.

    label: in what it differs from the others, by setting. loss: of the last evaluation, in nats
    per token. peak: the highest of its runs. seconds, tokens: the mean of its runs. dominated_by:
    the number (from 1) of a setting that is nowhere worse and somewhere better.
    """

    runs: list[History]
    label: dict[str, str]
    loss: Interval | None
    peak: Peak | None
    seconds: float
    tokens: int
    published: list[Evidence]
    dominated_by: int | None = None

    @property
    def perplexity(self) -> Interval | None:
        """exp of `loss` and of its ends."""
        if self.loss is None:
            return None
        low, high = (None if x is None else perplexity(x) for x in (self.loss.low, self.loss.high))
        return Interval(perplexity(self.loss.mean), low, high)

    @property
    def seeds(self) -> list[int]:
        return sorted(run.config.train.seed for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """Something that a fair comparison holds equal, and is not. values: one for each setting."""

    what: str
    values: list[str]

    def sentence(self) -> str:
        return f"{self.what}: {' | '.join(dict.fromkeys(self.values))}"


@dataclass(frozen=True)
class Comparison:
    """Settings by perplexity, what makes them unequal, and in what they are judged."""

    settings: list[Setting]
    differences: list[Difference]
    judged_by: list[str]
    notes: list[str]

    @property
    def is_fair(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "comparable": self.is_fair,
            "differences": [asdict(each) for each in self.differences],
            "interval": HOW,
            "judged_by": self.judged_by,
            "notes": self.notes,
            "settings": [_record(setting) for setting in self.settings],
        }


def compared(runs: Sequence[History]) -> Comparison:
    """The comparison of runs that have all been trained a little."""
    groups: dict[Any, list[History]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    members = list(groups.values())
    labels = _labels([group[0] for group in members])
    settings = [_setting(group, label) for group, label in zip(members, labels, strict=True)]
    settings.sort(key=lambda each: math.inf if each.loss is None else each.loss.mean)
    differences = list(_differences(settings))
    judged_by, notes = _judged(settings)
    if not differences:
        settings = [_placed(setting, settings, judged_by) for setting in settings]
    return Comparison(settings, differences, judged_by, [*notes, *_notes(settings)])


def _key(run: History) -> tuple[tuple[str, str], ...]:
    """Equal for runs that differ only in their seeds."""
    told = dict(flatten(run.config.model_dump()))
    told = {key: value for key, value in told.items() if not key.startswith(_ASIDE)}
    return tuple((key, repr(value)) for key, value in sorted(told.items()))


def _setting(runs: list[History], label: dict[str, str]) -> Setting:
    runs = sorted(runs, key=lambda run: (run.config.train.seed, run.name))
    losses = [run.final.eval_loss for run in runs if run.final is not None]
    peaks = [run.peak for run in runs if run.peak is not None]
    return Setting(
        runs=runs,
        label=label,
        loss=interval(losses) if len(losses) == len(runs) else None,
        peak=max(peaks, key=lambda peak: peak.bytes, default=None),
        seconds=sum(run.seconds for run in runs) / len(runs),
        tokens=round(sum(run.trained[-1].tokens for run in runs) / len(runs)),
        published=[row for row in published_beside(runs[0]) if _is_of(row, runs[0])],
    )


def _is_of(row: Evidence, run: History) -> bool:
    return row.method == run.config.optimizer.method and row.updates == run.updates


def _labels(runs: Sequence[History]) -> list[dict[str, str]]:
    """Method, rank and rate; of the other settings those in which runs of a method differ, and
    `_SHOWN`."""
    told = [_told_of(run) for run in runs]
    everywhere = {key for key in _SHOWN if len({each[key] for each in told}) > 1}
    labels = []
    for mine in told:
        alike = [each for each in told if each["method"] == mine["method"]]
        keys = {key for each in alike for key in each if each.get(key) != mine.get(key)}
        keys = (keys | everywhere) - {"method", "rank", "lr"}
        extra = {key.rpartition(".")[2]: mine.get(key, _ABSENT) for key in sorted(keys)}
        labels.append({key: mine[key] for key in ("method", "rank", "lr")} | extra)
    return labels


def _told_of(run: History) -> dict[str, str]:
    """Settings as text, by dotted key; method, rank and rate by their own names."""
    optimizer = run.config.optimizer
    rank: Any = optimizer.rank
    if isinstance(rank, dict):
        rank = "/".join(str(value) for value in rank.values())
    own = {"method": optimizer.method, "rank": "-" if rank == "auto" else str(rank)}
    own["lr"] = f"{settled(optimizer.lr):g}"
    skipped = (*_ASIDE, *_TOLD, "optimizer.method", "optimizer.lr", "optimizer.rank")
    rest = flatten(run.config.model_dump())
    return own | {key: str(value) for key, value in rest if not key.startswith(skipped)}


def _differences(settings: Sequence[Setting]) -> Iterator[Difference]:
    """What is unequal of all that a fair comparison holds equal."""
    runs = [run for each in settings for run in each.runs]
    corpora = {run.corpus for run in runs}
    same_text = len(corpora) == 1 and None not in corpora  # whatever its folder is called
    facts = {id(run): _facts(run, with_corpus=None not in corpora) for run in runs}
    for what in facts[id(runs[0])]:
        values = [list(dict.fromkeys(facts[id(run)][what] for run in s.runs)) for s in settings]
        distinct = {value for several in values for value in several}
        if len(distinct) > 1 and not (same_text and what in ("data", "tokenizer")):
            yield Difference(what, [" or ".join(several) for several in values])
    yield from _schedules(settings)
    counts = [str(len(each.runs)) for each in settings]
    if len(set(counts)) > 1:
        yield Difference("number of seeds", counts)
    if any(len(set(each.seeds)) < len(each.seeds) for each in settings):
        yield Difference("seeds, one of them twice", [str(each.seeds) for each in settings])


def _schedules(settings: Sequence[Setting]) -> Iterator[Difference]:
    """Unequal where one method has a schedule that another has not; one may be tried with many."""
    values = [_schedule(each.runs[0]) for each in settings]
    of_method: dict[str, set[str]] = {}
    for setting, value in zip(settings, values, strict=True):
        of_method.setdefault(setting.label["method"], set()).add(value)
    if any(schedules != set(values) for schedules in of_method.values()):
        yield Difference("schedule", values)


def _schedule(run: History) -> str:
    """The schedule in words; warm-up in updates, however it was given."""
    schedule = run.config.schedule
    warmup = schedule.warmup_updates(schedule.cycle or run.updates)
    words = [schedule.kind, f"{warmup} updates of warm-up"]
    if schedule.kind != "constant":
        words.append(f"to {schedule.min_ratio:g}")
    if schedule.kind == "wsd":
        words.append(f"in the last {schedule.decay:g}")
    if schedule.cycle:
        words.append(f"every {schedule.cycle} updates")
    if schedule.start == "zero":
        words.append("first rate 0")
    return ", ".join(words)


def _facts(run: History, *, with_corpus: bool) -> dict[str, str]:
    """What a fair comparison holds equal, in words."""
    config, model = run.config, resolve_model(run.config.model, run.folder)
    seq_len, final = settled(config.data.seq_len), run.final
    corpus = f" ({run.corpus[:8]})" if with_corpus and run.corpus else ""
    evaluation = "none"
    if final is not None:
        evaluation = f"{final.eval_tokens:,} tokens after {run.tokens_at(final.update):,}"
    return {
        "model": f"{format_count(model.parameters)} weights, {model.hidden_size} wide",
        "tokens": f"{run.trained[-1].tokens:,}",
        "batch": f"{rows_of(config.train.batch, seq_len)} x {seq_len} tokens",
        "protocol": config.data.protocol,
        "data": f"{config.data.source}{corpus}",
        "tokenizer": f"{config.data.tokenizer}, {model.vocab_size} ids",
        "evaluation": evaluation,
    }


def _judged(settings: Sequence[Setting]) -> tuple[list[str], list[str]]:
    """(by what settings are better or worse, why by nothing else)."""
    judged, notes = ["perplexity", "tokens"], []
    kinds = {each.peak.what if each.peak else "unknown" for each in settings}
    if len(kinds) == 1 and not kinds & {"unknown", "process"}:
        judged.append("peak")
    else:
        notes.append(f"peaks are not compared: measured are {', '.join(sorted(kinds))}")
    machines = {run.machine for each in settings for run in each.runs}
    if len(machines) == 1:
        judged.append("time")
    else:
        notes.append(f"times are not compared, of several machines: {'; '.join(sorted(machines))}")
    return judged, notes


def _notes(settings: Sequence[Setting]) -> Iterator[str]:
    """What a reader of the table must know of its rows."""
    if all(len(each.runs) == 1 for each in settings):
        yield "one seed each: nothing says how much of a difference is chance"
    first = settings[0].loss
    if first is not None and first.high is not None:
        near = [
            str(number)
            for number, each in enumerate(settings[1:], start=2)
            if each.loss and each.loss.low is not None and each.loss.low <= first.high
        ]
        if near:
            yield f"these seeds do not tell apart: 1, {', '.join(near)} (intervals overlap)"
    for run in (run for each in settings for run in each.runs):
        if run.status != "finished":
            yield f"{run.folder} is {run.status}: {run.done} of {run.updates} updates"
        if any(event.get("event") == "converted" for event in run.events):
            yield f"{run.folder} changed its settings on the way"
        yield from (f"{run.folder}: {warning}" for warning in run.warnings)


def _placed(setting: Setting, others: Sequence[Setting], judged_by: Sequence[str]) -> Setting:
    mine = _costs(setting, judged_by)
    better = (
        number
        for number, other in enumerate(others, start=1)
        if _dominates(_costs(other, judged_by), mine)
    )
    return Setting(**{**vars(setting), "dominated_by": next(better, None)})


def _costs(setting: Setting, judged_by: Sequence[str]) -> list[float]:
    """Less is better, in each."""
    costs = {
        "perplexity": math.inf if setting.loss is None else setting.loss.mean,
        "tokens": setting.tokens,
        "peak": setting.peak.bytes if setting.peak else math.inf,
        "time": setting.seconds,
    }
    return [costs[name] for name in judged_by]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _record(setting: Setting) -> dict[str, Any]:
    return {
        "label": setting.label,
        "runs": [str(run.folder) for run in setting.runs],
        "status": [run.status for run in setting.runs],
        "seeds": setting.seeds,
        "tokens": setting.tokens,
        "loss": None if setting.loss is None else asdict(setting.loss),
        "perplexity": None if setting.perplexity is None else asdict(setting.perplexity),
        "peak": None if setting.peak is None else asdict(setting.peak),
        "seconds": setting.seconds,
        "dominated_by": setting.dominated_by,
        "published_protocol_perplexity": [run.published_perplexity for run in setting.runs],
        "published": [
            {"perplexity": row.ppl, "rank": row.rank, "source": row.source, "mark": row.mark}
            for row in setting.published
        ],
    }
