"""The papers' protocol in training and evaluation, against a slow transcription of its trainer."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem.config.schema import Config, EvaluateConfig
from lowmem.data.batches import UpdateBatch
from lowmem.data.prepare import prepare
from lowmem.data.shards import Corpus, TokenStream
from lowmem.data.tokenizer import load_tokenizer
from lowmem.model.llama import Llama
from lowmem.optim.step import gather
from lowmem.planner.hardware import find_card
from lowmem.planner.search import make_plan
from lowmem.train.build import build, text_of
from lowmem.train.evaluate import evaluate, evaluate_documents, evaluate_folder, validation_of
from lowmem.train.events import Event, Measured, Trained
from lowmem.train.loop import train
from lowmem.train.run import Run
from tests.conftest import tiny_documents

LENGTH = 32
MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def documents(
    tiny_text: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Corpus:
    """Words, then sentences of C4: documents of very different lengths, most shorter than a row."""
    folder, out = tmp_path_factory.mktemp("lines"), tmp_path_factory.mktemp("documents")
    for split in ("train", "validation"):
        text = "\n".join(tiny_documents(tiny_text, split))
        pieces = text.split()[:500] + re.split(r"[.\n]", text)[:2500]
        lines = [json.dumps({"text": piece}) for piece in pieces if piece.strip()]
        (folder / f"c4-{split}.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    options = {"row_tokens": LENGTH, "workers": 1}
    return prepare(str(folder), tokenizer, out, **options)  # type: ignore[arg-type]


@pytest.fixture
def papers(ready_config: MakeConfig, documents: Corpus) -> MakeConfig:
    """A configuration for these documents, all but what is given."""

    def make(**sections: object) -> Config:
        data = {"source": str(documents.folder), "protocol": "galore", "seq_len": LENGTH}
        return ready_config(data=data, **sections)

    return make


def padded(stream: TokenStream, pad: int) -> list[Tensor]:
    """Every document as the papers' input: LENGTH ids, padding behind its end."""
    rows = []
    for start, stop in pairwise(stream.starts.tolist()):
        row = torch.full((LENGTH,), pad, dtype=torch.int64)
        row[: stop - start] = torch.from_numpy(stream.read(start, stop - start))
        rows.append(row)
    return rows


def mean_loss(model: Llama, batch: list[Tensor], pad: int) -> tuple[float, int]:
    """Mean loss and number of targets as transformers has them: logits of every position, labels
    equal to the inputs, padding ignored, shifted inside the model."""
    inputs = torch.stack(batch)
    labels = inputs.masked_fill(inputs == pad, -100)[:, 1:]
    logits = model.logits(inputs)[:, :-1].double()
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss.item(), int((labels != -100).sum())


def tiny(config: Config) -> Llama:
    model, _ = build(config)
    model.initialise(1)
    with torch.no_grad():  # far enough from uniform that means of batches differ
        for weight in model.parameters():
            weight.mul_(3.0)
    return model


@pytest.mark.parametrize("gpus", [1, 2])
def test_both_perplexities_of_an_evaluation(
    papers: MakeConfig, documents: Corpus, gpus: int
) -> None:
    """Published: the sum of batch means / (number of batches + 1); the true one is by token."""
    stream = validation_of(documents)
    assert (np.diff(stream.starts) == LENGTH).sum() > 20  # documents that were cut
    pad = int((stream.counts == 0).nonzero()[0][0])  # T5's 0 is no token of a text; here 0 is one
    model, rows, batch, limit = tiny(papers()), padded(stream, pad), 24, 4000
    seen, steps, sums, total, count = 0, 1, 0.0, 0.0, 0  # `total_batches = 1`
    position = 0
    while position < len(rows) and seen <= limit:
        means = []
        for _ in range(gpus):
            taken = rows[position : position + batch]
            position += len(taken)
            if not taken:
                break
            loss, targets = mean_loss(model, taken, pad)
            means.append(loss)
            total, count = total + loss * targets, count + targets
            seen += sum(int((row != pad).sum()) for row in taken)
        sums += sum(means) / len(means)
        steps += 1
    found = evaluate_documents(
        model, stream, seq_len=LENGTH, tokens=limit, batch=batch, gpus=gpus, rows=5
    )
    assert steps > 4
    assert found.steps == steps - 1
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, abs=1e-6)
    assert found.published_loss == pytest.approx(sums / steps, abs=1e-6)
    assert found.published_perplexity == pytest.approx(math.exp(sums / steps), rel=1e-6)
    assert abs(found.loss - sums / (steps - 1)) > 1e-4  # tokens and batches do weigh differently


def test_leaving_out_padding_changes_neither_loss_nor_gradient(
    papers: MakeConfig, documents: Corpus
) -> None:
    """Against whole rows of LENGTH tokens, padding and all, as the papers compute them."""
    config = papers(train={"batch": "12seq", "clip": "off"})
    order = text_of(config, documents)[0]
    batch = next(each for each in map(order.of, range(100)) if has_short_rows(each))
    assert batch.lengths is not None
    documents_loss, norm = _gathered(config, batch.micro_batches(4))
    whole = replace(batch, lengths=torch.full_like(batch.lengths, LENGTH), by_length=False)
    targets = torch.arange(1, LENGTH + 1) >= batch.lengths[:, None]
    pairs = [
        (inputs, wanted.masked_fill(targets[start : start + 4], -100))
        for start, (inputs, wanted) in zip(range(0, 12, 4), whole.micro_batches(4), strict=True)
    ]
    loss, full_norm = _gathered(config, pairs)
    assert documents_loss == pytest.approx(loss, abs=2e-6)  # float32 sums in another order
    assert norm == pytest.approx(full_norm, rel=1e-5)


def has_short_rows(batch: UpdateBatch) -> bool:
    """Is a micro-batch of four narrower than LENGTH? Which are, the sources decide."""
    return any(inputs.shape[1] < LENGTH for inputs, _ in batch.micro_batches(4))


def _gathered(config: Config, batches: object) -> tuple[float, float]:
    model, optimizer = build(config)
    model.initialise(0)
    pairs = list(batches)  # type: ignore[call-overload]
    tokens = sum(int((targets >= 0).sum()) for _, targets in pairs)
    loss, norm = gather(model, optimizer, pairs, count=len(pairs), tokens=tokens, lr=0.1, clip=None)
    return loss.item(), norm.item()


@pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])
def test_measured_peak_of_the_first_update_is_the_planned_one(
    tiny_config: MakeConfig, documents: Corpus, mode: str
) -> None:
    """A document as long as a row is among the first eight; shorter rows need less."""
    data = {"source": str(documents.folder), "protocol": "galore", "seq_len": LENGTH}
    config = tiny_config(
        data=data,
        optimizer={"method": "galore", "rank": 8},
        train={"update": mode, "micro_batch": 4, "batch": "8seq", "updates": 2},
    )
    plan = make_plan(config, find_card("24GB", "cpu"), [])
    lengths = text_of(plan.config, documents)[0].of(0).lengths
    assert lengths is not None
    assert lengths.max() == LENGTH
    events: list[Event] = []
    train(Run.create(plan.config, plan.to_json()), documents, events.append, plan)
    (measured,) = [event for event in events if isinstance(event, Measured)]
    assert measured.measured == measured.planned


def test_a_subspace_is_not_chosen_from_the_longest_documents(
    papers: MakeConfig, documents: Corpus
) -> None:
    batches = {
        mode: text_of(papers(train={"update": mode}), documents)[0].of(0)
        for mode in ("unfused", "fused+subspace")
    }
    assert {mode: batch.by_length for mode, batch in batches.items()} == {
        "unfused": True,
        "fused+subspace": False,
    }


def test_a_run_reports_both_figures_and_its_checkpoint_evaluates_to_them(
    papers: MakeConfig, documents: Corpus
) -> None:
    """Real tokens are counted, and the export's lowmem.json says by which protocol."""
    config = papers(
        train={"updates": 6, "batch": "8seq"},
        evaluate={"every": 3, "tokens": 3000, "batch": 16},
        checkpoint={"every": 3},
    )
    run = Run.create(config, None)
    events: list[Event] = []
    finished = train(run, documents, events.append)
    order = text_of(config, documents)[0]
    assert finished.tokens == sum(order.of(update).tokens for update in range(6)) < 6 * 8 * LENGTH
    assert finished.published_loss is not None
    assert finished.published_loss < finished.eval_loss
    told = [line["published_loss"] for line in run.metrics() if "eval_loss" in line]
    assert told[-1] == finished.published_loss
    again = evaluate_folder(
        run.folder,
        documents,
        tokens=3000,
        seq_len=None,
        device="cpu",
        batches=EvaluateConfig(batch=16),
    )
    assert again.loss == pytest.approx(finished.eval_loss, abs=1e-6)
    assert again.published_loss == pytest.approx(finished.published_loss, abs=1e-6)
    assert '"protocol": "galore"' in (run.latest() / "model" / "lowmem.json").read_text()
    assert not any(isinstance(event, Measured) for event in events)  # there was no plan


def test_a_run_goes_on_bit_for_bit(papers: MakeConfig, documents: Corpus) -> None:
    config = papers(train={"updates": 6, "batch": "8seq"}, checkpoint={"every": 3, "keep": 9})
    run = Run.create(config, None)

    def losses() -> list[float]:
        return [line["loss"] for line in run.metrics() if "loss" in line]

    train(run, documents, lambda event: None)
    whole = losses()
    seen: list[Event] = []
    train(replace(run, start=run.checkpoints / "step-000003"), documents, seen.append)
    assert losses() == whole
    assert sum(isinstance(event, Trained) for event in seen) == 3


def test_a_resumed_run_knows_its_best_evaluation(papers: MakeConfig, documents: Corpus) -> None:
    """At rate 0 all evaluations are equal, so that the first is the best one."""
    config = papers(
        optimizer={"lr": 0.0},
        train={"updates": 4, "batch": "8seq"},
        evaluate={"every": 1, "tokens": 500, "batch": 16},
        checkpoint={"every": 2, "keep": 9},
    )
    run = Run.create(config, None)
    train(run, documents, lambda event: None)
    train(replace(run, start=run.checkpoints / "step-000002"), documents, lambda event: None)
    marks = [line["best"] for line in run.metrics() if "eval_loss" in line]
    assert marks == [True, False, False, False]


def test_packed_text_has_no_published_figure(ready_config: MakeConfig, tiny_corpus: Corpus) -> None:
    model, _ = build(ready_config())
    model.initialise(0)
    found = evaluate(model, validation_of(tiny_corpus), seq_len=LENGTH, tokens=500)
    assert found.published_loss is None
