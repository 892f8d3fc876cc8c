"""`lowmem train`: plan, then train a new run."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.console import Console
from lowmem.cli.options import Given
from lowmem.cli.settings import explicit_command, loaded, planned, require_fit
from lowmem.config.defaults import rows_of
from lowmem.config.presets import resolve_model
from lowmem.config.schema import Config, settled
from lowmem.data.shuffle import BUFFER
from lowmem.errors import LowMemError, command_line
from lowmem.planner.plan import Plan
from lowmem.train.events import Finished, perplexity
from lowmem.train.run import Run, require_new

if TYPE_CHECKING:
    from lowmem.data.shards import Corpus


def train(given: Given, *, dry_run: bool, as_json: bool) -> None:
    """Plan, prepare the data, create the run's folder and train in it.

    A dry run for a named card needs none, like `lowmem plan`.
    """
    console = Console(quiet=given.quiet, verbose=given.verbose)
    config = loaded(given, console).config
    if not dry_run:
        require_new(config)
    plan = planned(config, for_this_machine=not dry_run)
    if dry_run and plan.config.train.device == "cuda" and not _has_cuda():
        console.say(
            "Planned for the card: there is no CUDA device here. Without --dry-run this machine "
            "trains on its CPU,\nwhich --device cpu plans."
        )
    shown = dry_run and not as_json
    console.plan(plan, as_result=shown)
    if dry_run and as_json:
        console.json(plan.to_json())
    require_fit(plan)
    model = config.model if isinstance(config.model, str) else None
    if model in (None, "auto") and isinstance(plan.config.model, str):
        model = plan.config.model
    console.say(f"\nThe same, explicitly:\n  {explicit_command(plan, given, model)}\n")
    if dry_run:
        return
    corpus = checked_corpus(plan, console)
    run = Run.create(plan.config, plan.to_json())
    finished = trained(run, corpus, console, plan)
    show_finished(console, finished, run.folder, as_json=as_json)


def _has_cuda() -> bool:
    import torch  # here, because other commands take parts of this file without it

    return torch.cuda.is_available()


def checked_corpus(plan: Plan, console: Console) -> "Corpus":
    """The text of a run that is about to begin; what stands in its way is told before a folder
    is made."""
    from lowmem.train.build import declared_bytes, require_hardware, require_host_memory, text_of
    from lowmem.train.disk import require_room

    require_hardware(plan.config)
    require_host_memory(plan)
    corpus = corpus_of(plan.config, console)
    text_of(plan.config, corpus)
    require_room(plan.config, Path(plan.config.run.out), declared_bytes(plan.config), 0)
    return corpus


def trained(run: Run, corpus: "Corpus", console: Console, plan: Plan | None = None) -> Finished:
    """Train a run to its end, or on to it; plan: of one that begins."""
    from lowmem.train.loop import train as train_run

    console.say(f"{run.folder}  Ctrl-C saves and stops")
    with console.progress() as report, traced_in(run.folder):
        return train_run(run, corpus, report, plan)


def corpus_of(config: Config, console: Console) -> "Corpus":
    """The tokens that `config` names, prepared on first use."""
    from lowmem.data.prepare import corpus_for

    vocab_size = resolve_model(config.model, Path.cwd()).vocab_size
    with console.work("data") as report:
        corpus = corpus_for(
            config.data,
            vocab_size,
            max_tokens=_streamed_tokens(config),
            progress=lambda p: report(p.bytes_done, p.bytes, f"{p.tokens:,} tokens"),
        )
    if corpus.skipped:
        console.say(f"warning: {corpus.skipped}")
    return corpus


def _streamed_tokens(config: Config) -> int | None:
    """Tokens to take from a stream that is larger than any run: what the run will read, once."""
    if config.data.source != "c4" or config.train.updates == "auto":
        return None
    seq_len = settled(config.data.seq_len)
    rows = settled(config.train.updates) * rows_of(config.train.batch, seq_len)
    if config.data.protocol == "lowmem":
        return rows * seq_len + 1
    # Documents of the last update are shuffled as in a longer stream; validation gets a twentieth.
    return max((rows + BUFFER) * seq_len, 20 * settled(config.evaluate.tokens))


@contextmanager
def traced_in(folder: Path) -> Iterator[None]:
    """Keep the traceback of an exception that nobody foresaw in the run's folder."""
    try:
        yield
    except LowMemError:
        raise
    except Exception as error:
        log = folder / "log" / time.strftime("error-%Y%m%d-%H%M%S.txt")
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise


def show_finished(console: Console, finished: Finished, folder: Path, *, as_json: bool) -> None:
    """The end of a run on stdout."""
    reached = perplexity(finished.eval_loss)
    if as_json:
        console.json({"folder": str(folder), **asdict(finished), "perplexity": reached})
        return
    published = finished.published_loss
    told = ""
    if published is not None:
        told = (
            f"  as published loss {published:.4f}  perplexity {perplexity(published):.5g}"
            "  (the papers' way to average, which is too low)\n"
        )
    console.result(
        f"{folder}  {finished.update} updates  {finished.tokens:,} tokens\n"
        f"  validation  loss {finished.eval_loss:.4f}  perplexity {reached:.5g}\n{told}"
        f"  unigram     loss {finished.unigram_loss:.4f}"
        f"  perplexity {perplexity(finished.unigram_loss):.5g}"
        "  (knows only how frequent each token is)"
    )
    for words in (("eval", folder), ("sample", folder, "--prompt", "The ")):
        console.result(f"  {command_line(*words)}")
