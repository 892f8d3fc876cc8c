"""Evaluation: every token once, weighted alike, the same from a run and from its export."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowmem.config.schema import Config
from lowmem.data.shards import Corpus
from lowmem.errors import OutOfMemoryError
from lowmem.model.llama import Llama
from lowmem.train import evaluate as subject
from lowmem.train.build import build
from lowmem.train.checkpoint import export
from lowmem.train.evaluate import evaluate, evaluate_folder, perplexity, validation_of
from lowmem.train.loop import train
from lowmem.train.run import Run

MakeConfig = Callable[..., Config]


def settings(config: Config) -> Config:
    train_section = config.train.model_copy(
        update={"micro_batch": 8, "update": "unfused", "recompute": "keep", "clip": "off"}
    )
    optimizer = config.optimizer.model_copy(update={"method": "adamw", "lr": 0.01})
    return config.model_copy(update={"train": train_section, "optimizer": optimizer})


def test_loss_is_the_mean_over_all_tokens(
    tiny_config: MakeConfig, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against cross entropy in float64, window by window; other batch sizes change nothing."""
    model, _ = build(settings(tiny_config()))
    model.initialise(0)
    stream = validation_of(tiny_corpus)
    tokens = 32 * 10 + 7  # the last window is short
    sums = []
    for start in range(0, tokens, 32):
        count = min(32, tokens - start)
        ids = torch.from_numpy(stream.read(start, count + 1))
        logits = model.logits(ids[None, :-1]).double()[0]
        sums.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    expected = torch.stack(sums).sum().item() / tokens
    for size in (32, 4096):
        monkeypatch.setattr(subject, "TOKENS_AT_ONCE", size)
        found = evaluate(model, stream, seq_len=32, tokens=tokens)
        assert found.tokens == tokens
        assert found.loss == pytest.approx(expected, abs=1e-6)
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_run_and_its_export_evaluate_alike(
    tiny_config: MakeConfig, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    run = Run.create(settings(tiny_config()), None)
    finished = train(run, tiny_corpus, lambda event: None)
    out = tmp_path / "hf-out"
    export(run.folder, out)
    found = [
        evaluate_folder(path, tiny_corpus, tokens=None, seq_len=None, device="cpu")
        for path in (run.folder, out, run.latest(), run.latest() / "model")
    ]
    assert len({result.loss for result in found}) == 1
    assert found[0].tokens == validation_of(tiny_corpus).tokens - 1
    short = evaluate_folder(out, tiny_corpus, tokens=2000, seq_len=32, device="cpu")
    assert short.loss == pytest.approx(finished.eval_loss, abs=1e-6)  # other rows per pass


def test_no_memory_for_one_sequence_is_an_error_of_its_own(
    tiny_config: MakeConfig,
    tiny_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run.create(settings(tiny_config()), None)
    train(run, tiny_corpus, lambda event: None)
    tried: list[int] = []

    def refuse(model: Llama, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tried.append(len(inputs))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Llama, "loss_sum", refuse)
    with pytest.raises(OutOfMemoryError, match="in the evaluation of") as caught:
        evaluate_folder(run.folder, tiny_corpus, tokens=2000, seq_len=None, device="cpu")
    assert tried[-1] == 1 < tried[0]
    assert caught.value.why == "CUDA out of memory. Tried to allocate 2 GiB"
    assert caught.value.exit_code == 7


def test_transformers_loads_the_export_with_equal_logits(
    tiny_config: MakeConfig, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowmem.model.huggingface import load_folder

    run = Run.create(settings(tiny_config()), None)
    train(run, tiny_corpus, lambda event: None)
    export(run.folder, tmp_path / "hf-out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf-out")
    ours = load_folder(tmp_path / "hf-out", torch.float32, "cpu")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf-out")
    text = "def forward(self):\n    return 1"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_perplexity_of_a_hopeless_loss_is_infinite() -> None:
    assert perplexity(1e4) == math.inf
