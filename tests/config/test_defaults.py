"""What nobody gave: every branch, with the sentence that says so, and nothing else touched."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.config.defaults import rows_of, settle, with_updates
from lowmem.config.load import flatten
from lowmem.config.schema import Config
from lowmem.errors import ConfigError
from lowmem.model.llama import Llama

SHORT = {  # a model of 64 positions
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
GIVEN: dict[str, Any] = {
    "model": "llama-9m",
    "data": {"source": "c4", "seq_len": 100},
    "train": {"updates": 70, "batch": "24seq", "weights": "fp32", "device": "cpu"},
    "evaluate": {"every": 7, "tokens": 1234},
    "checkpoint": {"every": 9},
}


def settled(*, cuda: bool = False, **sections: Any) -> tuple[Config, list[str]]:
    return settle(Config.model_validate(sections), cuda=cuda)


@pytest.mark.parametrize(
    ("asked", "cuda", "device", "weights"),
    [
        ("auto", True, "cuda", "auto"),  # the planner chooses
        ("auto", False, "cpu", "fp32"),
        ("cpu", True, "cpu", "fp32"),
        ("cuda", False, "cuda", "auto"),  # a plan for a card that stands elsewhere
    ],
)
def test_device_and_weights(asked: str, cuda: bool, device: str, weights: str) -> None:
    config, _ = settled(cuda=cuda, train={"device": asked})
    assert (config.train.device, config.train.weights) == (device, weights)


@pytest.mark.parametrize(
    ("cuda", "model", "reason"),
    [(True, "llama-60m", "the smallest of the papers"), (False, "llama-tiny", "no CUDA device")],
)
def test_a_model_for_the_device(cuda: bool, model: str, reason: str) -> None:
    config, notes = settled(cuda=cuda)
    assert config.model == model
    assert notes[0].startswith(f"model {model}: {reason}")


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(ConfigError, match="--model llama-61m is neither a preset nor a file"):
        settled(model="llama-61m")


@pytest.mark.parametrize(("source", "said"), [("sample", True), ("c4", False), ("a.txt", False)])
def test_the_sample_corpus_is_pointed_out(source: str, said: bool) -> None:
    _, notes = settled(data={"source": source})
    assert any(note.startswith("data: ") for note in notes) == said


@pytest.mark.parametrize(("model", "length"), [("llama-60m", 256), (SHORT, 64)])
def test_sequence_length_is_that_of_the_papers_or_of_the_model(model: Any, length: int) -> None:
    config, notes = settled(model=model)
    assert config.data.seq_len == length
    assert any(note.startswith(f"seq-len {length}: ") for note in notes)


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    assert settled(model=SHORT, data={"seq_len": 64})[0].data.seq_len == 64
    with pytest.raises(ConfigError, match=r"data.seq_len = 65 .* the model's 64 positions") as e:
        settled(model=SHORT, data={"seq_len": 65})
    assert e.value.fix.startswith("--seq-len 64")


@pytest.mark.parametrize(
    ("source", "cuda", "batch", "tokens"),
    [
        ("sample", True, "32seq", "8.19 k"),
        ("sample", False, "8seq", "2.05 k"),
        ("c4", True, "512seq", "131.1 k"),
        ("c4", False, "512seq", "131.1 k"),
    ],
)
def test_batch_of_the_papers_or_less_for_the_sample(
    source: str, cuda: bool, batch: str, tokens: str
) -> None:
    config, notes = settled(cuda=cuda, data={"source": source})
    assert config.train.batch == batch
    assert f"batch {batch}: {tokens} tokens per update" in notes


@pytest.mark.parametrize(
    ("batch", "rows"),
    [("3seq", 3), ("131k-tokens", 512), ("1280tokens", 5), ("1290 tokens", 5), ("256 tokens", 1)],
)
def test_a_batch_in_tokens_becomes_sequences(batch: str, rows: int) -> None:
    config, notes = settled(data={"source": "c4", "seq_len": 256}, train={"batch": batch})
    assert config.train.batch == f"{rows}seq"
    assert not any(note.startswith("batch") for note in notes)


@pytest.mark.parametrize("batch", ["16777217seq", "9" * 30 + "seq", "9" * 30 + "-tokens"])
def test_a_batch_beyond_all_sizes_is_refused(batch: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch = .* sequences") as caught:
        rows_of(batch, 256)
    assert "at most 16,777,216" in caught.value.why


@given(st.integers(1, 10**7), st.integers(1, 4096))
def test_a_batch_in_tokens_is_met_to_half_a_sequence(tokens: int, seq_len: int) -> None:
    batch = f"{tokens}tokens"
    if tokens < seq_len:
        with pytest.raises(ConfigError, match=f"less than one sequence of {seq_len} tokens") as e:
            rows_of(batch, seq_len)
        assert e.value.fix.startswith(f"--batch {seq_len}-tokens")
    else:
        assert abs(rows_of(batch, seq_len) * seq_len - tokens) * 2 <= seq_len


@pytest.mark.parametrize(("tokens", "updates"), [(1, 1), (2048, 1), (2049, 2), ("1M", 489)])
def test_a_budget_of_tokens_becomes_updates(tokens: int | str, updates: int) -> None:
    """8 sequences of 256 tokens; the last update may go beyond the budget, never fall short."""
    config, notes = settled(data={"seq_len": 256}, train={"tokens": tokens, "batch": "8seq"})
    assert (config.train.updates, config.train.tokens) == (updates, None)
    assert not any(note.startswith("updates") for note in notes)


def test_hours_leave_the_updates_to_the_planner() -> None:
    config, notes = settled(cuda=True, train={"hours": 48})
    assert (config.train.hours, config.train.updates) == (48, "auto")
    assert (config.evaluate.every, config.checkpoint.every) == ("auto", "auto")
    assert not any(note.startswith("updates") for note in notes)
    known = with_updates(config, 5000)
    assert (known.train.hours, known.train.updates) == (None, 5000)
    assert (known.evaluate.every, known.checkpoint.every) == (1000, 1000)


@pytest.mark.parametrize(("cuda", "updates"), [(True, 1000), (False, 500)])
def test_updates_on_the_sample_corpus(cuda: bool, updates: int) -> None:
    config, notes = settled(cuda=cuda)
    assert config.train.updates == updates
    assert any(note.startswith(f"updates {updates}: the sample corpus is small") for note in notes)


def test_updates_on_real_text_are_20_tokens_per_parameter() -> None:
    config, notes = settled(model=SHORT, data={"source": "c4"}, train={"batch": "2seq"})
    model = config.model
    assert not isinstance(model, str)
    weights = Llama(model, dtype=torch.float32, device="meta", attention="cpu").parameters()
    updates = math.ceil(20 * sum(weight.numel() for weight in weights) / (2 * 64))
    assert config.train.updates == updates
    assert f"updates {updates}: 20 tokens per parameter" in notes


@pytest.mark.parametrize(
    ("updates", "evaluate", "save"), [(1, 1, 1), (4, 1, 1), (50, 10, 10), (60_000, 12_000, 1000)]
)
def test_a_run_is_evaluated_five_times_and_saved_every_1000_updates(
    updates: int, evaluate: int, save: int
) -> None:
    config, _ = settled(train={"updates": updates})
    assert (config.evaluate.every, config.checkpoint.every) == (evaluate, save)


@pytest.mark.parametrize(("cuda", "tokens"), [(True, 10_000_000), (False, 100_000)])
def test_tokens_of_an_evaluation(cuda: bool, tokens: int) -> None:
    assert settled(cuda=cuda)[0].evaluate.tokens == tokens


def test_only_at_the_end_stays_only_at_the_end() -> None:
    config, _ = settled(evaluate={"every": 0}, checkpoint={"every": 0})
    assert (config.evaluate.every, config.checkpoint.every) == (0, 0)


@pytest.mark.parametrize("cuda", [True, False])
def test_what_was_given_stays_and_needs_no_note(cuda: bool) -> None:
    config, notes = settled(cuda=cuda, **GIVEN)
    assert config == Config.model_validate(GIVEN)
    assert notes == []


@pytest.mark.parametrize("cuda", [True, False])
def test_settling_again_changes_nothing(cuda: bool) -> None:
    """A run's config.toml is settled: it must mean the same on another machine."""
    once, _ = settled(cuda=cuda, data={"source": "c4"}, train={"tokens": "2M"})
    again, notes = settle(once, cuda=not cuda)
    assert again == once
    assert notes == []


def test_only_the_planner_is_left_with_choices() -> None:
    config, _ = settled()
    left = {key for key, value in flatten(config.model_dump()) if value == "auto"}
    assert left == {
        "gpu",
        "others",
        "data.tokenizer",
        "optimizer.method",
        "optimizer.lr",
        "optimizer.weight_decay",
        "optimizer.rank",
        "optimizer.states",
        "optimizer.place",
        "optimizer.rest.method",
        "optimizer.rest.states",
        "train.micro_batch",
        "train.update",
        "train.boundaries",
        "train.blocks",
        "train.recompute",
        "train.logits",
        "train.clip",
        "train.ends",
        "train.sums",
        "train.trial",
    }


def test_ends_in_codes_make_the_blocks_codes_or_contradict_them() -> None:
    def asked(**train: str) -> Config:
        return settle(Config.model_validate({"train": {"ends": "int8", **train}}), cuda=False)[0]

    assert asked().train.weights == "int8"
    for weights in ("fp32", "bf16"):
        with pytest.raises(ConfigError, match=f'train.weights = "{weights}"') as caught:
            asked(weights=weights)
        assert "--weights int8" in caught.value.fix
