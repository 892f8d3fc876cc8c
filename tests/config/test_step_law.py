"""The Step Law as a learning rate that somebody asked for."""

from typing import Any

import pytest

from lowmem.config.defaults import settle
from lowmem.config.load import load
from lowmem.config.schema import Config, settled
from lowmem.config.step_law import step_law
from lowmem.errors import ConfigError


def asked(**flags: Any) -> Config:
    given: dict[str, Any] = {"model": "llama-60m", "data.source": "c4"}
    given |= {"optimizer.method": "adamw", "optimizer.lr": "step-law", "train.updates": 10_000}
    return load(given | {key.replace("__", "."): value for key, value in flags.items()}).config


@pytest.mark.parametrize(
    ("weights", "tokens", "rate", "sequences"),
    [
        (25.3e6, 1.31e9, 5.9e-3, 364),
        (85.0e6, 2.62e9, 3.1e-3, 541),
        (302.4e6, 7.86e9, 1.75e-3, 1013),
        (1208e6, 13.1e9, 7.6e-4, 1356),
        (6476e6, 19.7e9, 2.6e-4, 1711),
    ],
)
def test_the_law_gives_its_published_table(
    weights: float, tokens: float, rate: float, sequences: int
) -> None:
    law = step_law(weights, tokens)
    assert law.rate == pytest.approx(rate, rel=0.02)  # two digits are printed
    assert law.batch / 256 == pytest.approx(sequences, rel=0.005)


def test_embedding_and_head_do_not_count() -> None:
    filled, notes = settle(asked(), cuda=True)
    assert settled(filled.optimizer.lr) == pytest.approx(5.9e-3, rel=0.02)
    (note,) = [note for note in notes if "step law" in note]
    for told in ("arXiv:2503.04715", "N = 25.3 M", "D = 1.31 B", "its batch: 364seq", "outside"):
        assert told in note
    assert "sqrt" not in note


def test_a_batch_far_from_the_laws_scales_the_rate_and_says_so() -> None:
    filled, notes = settle(asked(train__batch="32seq", train__updates=160_000), cuda=True)
    expected = step_law(25_305_088, 160_000 * 32 * 256).rate * (32 / 364) ** 0.5
    assert settled(filled.optimizer.lr) == pytest.approx(expected, rel=2e-3)  # 364 is rounded
    assert any("sqrt" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"optimizer__method": "galore"}, "--method adamw"),
        ({"optimizer__method": "auto"}, "--method adamw"),
        ({"train__hours": 3, "train__updates": "auto"}, "--tokens"),
    ],
)
def test_where_the_law_says_nothing_it_is_refused(change: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(asked(**change), cuda=True)
    assert fix in caught.value.fix


def test_nobody_gets_it_unasked() -> None:
    filled, notes = settle(asked(optimizer__lr="auto"), cuda=True)
    assert filled.optimizer.lr == "auto"
    assert not any("step law" in note for note in notes)
