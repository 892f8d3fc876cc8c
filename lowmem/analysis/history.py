"""What a run has left in its folder, read back without torch.

    run = History.read(Path("runs/llama-60m-galore-1"))
    run.final.eval_loss, run.peak, run.seconds, run.status

A run may still be going on, or have ended anywhere: a last line without its end is not read yet,
other lines that are no record are left out and counted in `warnings`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from lowmem.analysis.reproduce import VERDICT
from lowmem.config.load import flatten
from lowmem.config.schema import Config, settled
from lowmem.errors import CheckpointError, command_line, short_path
from lowmem.planner.plan import Plan
from lowmem.train.events import Diagnosed, Evaluated, Measured, Trained, perplexity
from lowmem.train.lock import holder_of
from lowmem.train.run import EVENTS, METRICS, Run

Status = Literal["finished", "running", "unfinished"]
Record = TypeVar("Record", Trained, Evaluated, Diagnosed, Measured)


@dataclass(frozen=True)
class Peak:
    """Memory in bytes. what: "allocated" (CUDA), "tensors" (CPU) or "process" (unplanned, CPU)."""

    what: str
    bytes: int


@dataclass(frozen=True)
class History:
    """A run as its folder tells it.

    events: the objects of events.jsonl. corpus: fingerprint of the tokens, None before the first
    checkpoint. process: the id of the process of this machine that is training it.
    """

    folder: Path
    config: Config
    trained: list[Trained]
    evaluated: list[Evaluated]
    diagnosed: list[Diagnosed]
    events: list[dict[str, Any]]
    environment: dict[str, Any]
    plan: Plan | None
    verdict: dict[str, Any] | None
    corpus: str | None
    process: int | None
    warnings: list[str]

    @staticmethod
    def read(path: Path) -> "History":
        """The run at `path`, or the one that a checkpoint belongs to. CheckpointError otherwise."""
        run = Run.open(path)
        _require_settled(run)
        warnings: list[str] = []
        metrics = list(_objects(run.folder / METRICS, warnings))
        events = [record for _, record in _objects(run.folder / EVENTS, warnings)]
        kinds: dict[str, Any] = {"loss": Trained, "eval_loss": Evaluated, "diagnostics": Diagnosed}
        records: dict[Any, list[Any]] = {kind: [] for kind in kinds.values()}
        wrong = []
        for line, record in metrics:
            kind = next((kind for key, kind in kinds.items() if key in record), None)
            read = None if kind is None else _as(kind, record)
            if read is None:
                wrong.append(line)
            else:
                records[kind].append(read)
        if wrong:
            warnings.append(_left_out(METRICS, wrong))
        return History(
            folder=run.folder,
            config=run.config,
            trained=records[Trained],
            evaluated=records[Evaluated],
            diagnosed=records[Diagnosed],
            events=events,
            environment=_object(run.folder / "env.json", warnings) or {},
            plan=run.plan(),
            verdict=_object(run.folder / VERDICT, warnings),
            corpus=_corpus(run),
            process=holder_of(run.folder),
            warnings=warnings,
        )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def updates(self) -> int:
        """How many the run is to have."""
        return settled(self.config.train.updates)

    @property
    def done(self) -> int:
        return self.trained[-1].update + 1 if self.trained else 0

    @property
    def status(self) -> Status:
        if self.process is not None:
            return "running"
        return "finished" if self.finished is not None else "unfinished"

    @property
    def finished(self) -> dict[str, Any] | None:
        """The event of its end, None where it has none or went on after it."""
        ends = [e for e in self.events if e.get("event") in ("started", "finished")]
        return ends[-1] if ends and ends[-1]["event"] == "finished" else None

    @property
    def final(self) -> Evaluated | None:
        """The last evaluation."""
        return self.evaluated[-1] if self.evaluated else None

    @property
    def perplexity(self) -> float | None:
        return perplexity(self.final.eval_loss) if self.final else None

    @property
    def published_perplexity(self) -> float | None:
        """What the papers' evaluation makes of the same losses; None: of another protocol."""
        loss = self.final.published_loss if self.final is not None else None
        return None if loss is None else perplexity(loss)

    @property
    def seconds(self) -> float:
        """Of all updates, without evaluation, saving and loading."""
        return sum(each.seconds for each in self.trained)

    def elapsed(self) -> list[float]:
        """Seconds of training at the end of every update in `trained`."""
        return list(accumulate(each.seconds for each in self.trained))

    def tokens_at(self, update: int) -> int:
        """Tokens seen when `update` (0-based) was done; of the nearest earlier one that is told."""
        known = [each.tokens for each in self.trained if each.update <= update]
        return known[-1] if known else 0

    @property
    def measured(self) -> Measured | None:
        """The peak of the first update beside the plan's."""
        found = [_as(Measured, e) for e in self.events if e.get("event") == "measured"]
        return next((each for each in found if each is not None), None)

    @property
    def peak(self) -> Peak | None:
        """The highest memory of the run: of the whole run on CUDA, of its first update on a CPU."""
        highest = max((each.memory_bytes for each in self.trained), default=None)
        if highest is not None and self.config.train.device == "cuda":
            return Peak("allocated", highest)
        if self.measured is not None:
            return Peak(self.measured.what, self.measured.measured)
        return None if highest is None else Peak("process", highest)

    @property
    def machine(self) -> str:
        """What speed depends on, as far as the run has noted it."""
        known = self.environment
        where = known.get("device") or f"{known.get('system', '?')}, {known.get('threads')} threads"
        return f"{where}, torch {known.get('torch')}"

    def require_updates(self) -> "History":
        """Itself. CheckpointError: nothing has been trained yet."""
        if self.trained:
            return self
        going = " yet: it is just starting" if self.process is not None else ""
        raise CheckpointError(
            f"{short_path(self.folder)} has no updates{going}",
            f"its {METRICS} holds nothing that was trained",
            command_line("resume", self.folder),
        )


def _require_settled(run: Run) -> None:
    """CheckpointError: config.toml is not that of a run, which leaves nothing open."""
    told = dict(flatten(run.config.model_dump()))
    keys = ("train.updates", "train.batch", "data.seq_len", "optimizer.method", "optimizer.lr")
    left = [key for key in keys if told[key] == "auto"]
    if left:
        raise CheckpointError(
            f"{short_path(run.folder)} is no run",
            f"its config.toml leaves {', '.join(left)} open, which a run has settled",
            f"lowmem train --config {run.folder / 'config.toml'}",
        )


def read_all(paths: list[Path]) -> list[History]:
    """Every run, each once and each with updates. CheckpointError: one is no run, or has none."""
    found = {run.folder.resolve(): run for run in map(History.read, paths)}
    return [run.require_updates() for run in found.values()]


_FORMS: dict[Any, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (Trained, Evaluated, Diagnosed, Measured)
}


def _as(kind: type[Record], record: dict[str, Any]) -> Record | None:
    try:
        read: Record = _FORMS[kind].validate_python(record)
        return read
    except (ValidationError, RecursionError):
        return None


def _objects(path: Path, warnings: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file of JSON lines; what is none is counted in `warnings`."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", "", "change its permissions"
        ) from None
    *lines, _ = text.split("\n")  # the last one has no end: it is being written, or was cut
    wrong = []
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if isinstance(record, dict):
            yield number, record
        else:
            wrong.append(number)
    if wrong:
        warnings.append(_left_out(path.name, wrong))


def _left_out(name: str, lines: list[int]) -> str:
    what = "line is" if len(lines) == 1 else "lines are"
    return f"{name}: {len(lines)} {what} no record and left out, the first is line {lines[0]}"


def _object(path: Path, warnings: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is none; a damaged one is told."""
    try:
        record = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    if not isinstance(record, dict):
        warnings.append(f"{path.name} is no JSON object and left out")
        return None
    return record


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _corpus(run: Run) -> str | None:
    try:
        state = run.latest() / "state.json"
        found = _parsed(state.read_text(encoding="utf-8", errors="replace"))
    except (OSError, CheckpointError):
        return None
    corpus = found.get("corpus") if isinstance(found, dict) else None
    return corpus if isinstance(corpus, str) else None
