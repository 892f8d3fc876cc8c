"""The table beside Liger, with a stand-in where there is neither a card nor Liger."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lowmem.cli import bench_liger, bench_products, kernels
from lowmem.cli.bench_liger import PAIRS, SIZES, Pair, Sizes, beside_liger, why_no_liger
from lowmem.cli.main import run
from lowmem.config.presets import read_preset
from lowmem.kernels import examples, measure
from lowmem.kernels.example import Tensors

CARD = torch.device("cuda")
SMALL = Sizes(2, 3, 8, 2, 1, 5, 11)


@pytest.fixture
def short_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(kernels, "_BENCH_ELEMENTS", {"cpu": 700})
    monkeypatch.setattr(measure, "_COPIED_ON_CPU", 2**12)
    monkeypatch.setattr(examples, "EXAMPLES", examples.EXAMPLES[:1])
    monkeypatch.setattr(bench_products, "product_times", lambda device: iter(()))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Our work for Liger's, on the CPU and in small sizes; how often it was done."""
    done: Counter[str] = Counter()

    def counted(pair: Pair) -> Pair:
        def work(*arguments: torch.Tensor) -> Tensors:
            done[pair.operator] += 1
            return pair.ours(*arguments)

        return replace(pair, liger=work)

    monkeypatch.setattr(bench_liger, "PAIRS", [counted(pair) for pair in PAIRS])
    monkeypatch.setattr(bench_liger, "why_no_liger", lambda device: "")
    monkeypatch.setattr(bench_liger, "SIZES", SMALL)
    monkeypatch.setattr(bench_liger, "peak_bytes", lambda work, device: 2**20)
    return done


def test_every_operator_has_a_row(
    short_bench: None, stand_in: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["liger"]
    assert [row["operator"] for row in rows] == [pair.operator for pair in PAIRS]
    assert all(row["seconds"] > 0 and row["liger_seconds"] > 0 for row in rows)
    assert all(row["bytes"] == row["liger_bytes"] == 2**20 for row in rows)
    assert set(stand_in.values()) == {10}  # nine runs after one to warm up
    assert run(["bench", "kernels"]) == 0
    shown = capsys.readouterr()
    assert "6 tokens beside Liger" in shown.err
    assert all(pair.operator in shown.out for pair in PAIRS)


def test_without_a_card_the_bench_says_that_liger_needs_one(
    short_bench: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "kernels"]) == 0
    assert "Liger's kernels run on a card only" in capsys.readouterr().err


def test_a_card_without_liger_hears_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_liger.importlib.util, "find_spec", lambda name: None)
    assert "pip install liger-kernel" in why_no_liger(CARD)
    assert list(beside_liger(CARD)) == []


def test_sizes_are_those_of_7b() -> None:
    model = read_preset("llama-7b")
    assert (SIZES.hidden, SIZES.mlp) == (model.hidden_size, model.intermediate_size)
    assert (SIZES.heads, SIZES.vocabulary) == (model.num_attention_heads, model.vocab_size)
    assert SIZES.key_value_heads == model.num_key_value_heads
