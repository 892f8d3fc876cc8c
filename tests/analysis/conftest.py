"""Run folders as training leaves them, written in milliseconds."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.schema import Config
from lowmem.train.events import (
    Evaluated,
    Event,
    Finished,
    Measured,
    Metric,
    Part,
    Started,
    Trained,
    to_record,
)
from lowmem.train.run import EVENTS, METRICS, Run

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
}
Make = Callable[..., Path]
PAPERS = {"protocol": "galore"}  # the data of a run as in the papers
LOSSES = (6.0, 5.0, 4.5, 4.2)


def trained(update: int, loss: float, **changes: Any) -> Trained:
    """An update of 128 tokens and half a second."""
    told: dict[str, Any] = {"lr": 0.01, "grad_norm": 1.0, "norm_of": "gradient", "seconds": 0.5} | {
        "tokens": 128 * (update + 1),
        "tokens_per_second": 256.0,
        "memory_bytes": 10**9 + update,
    }
    return Trained(update=update, loss=loss, **(told | changes))


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """make_run("a", method="galore", seed=1): a finished run of four updates in runs/a."""

    def make(
        name: str,
        *,
        losses: Sequence[float] = LOSSES,
        final: float | None = 4.0,
        published: float | None = None,
        method: str = "adamw",
        lr: float = 0.01,
        seed: int = 0,
        corpus: str | None = "c0ffee" * 10,
        peak: int = 10**6,
        seconds: float = 0.5,
        eval_tokens: int = 1000,
        ended: bool = True,
        environment: dict[str, Any] | None = None,
        model: Any = MODEL,
        **sections: Any,
    ) -> Path:
        train = {"updates": len(losses) or 4, "batch": "4seq", "device": "cpu", "seed": seed}
        config = Config.model_validate(
            {
                "model": model,
                "data": {"source": "text", "seq_len": 32} | sections.pop("data", {}),
                "optimizer": {"method": method, "lr": lr} | sections.pop("optimizer", {}),
                "train": train | sections.pop("train", {}),
                "run": {"name": name, "out": str(tmp_path / "runs")},
            }
            | sections
        )
        run = Run.create(config, None)
        metrics: list[Metric] = [
            trained(update, loss, seconds=seconds) for update, loss in enumerate(losses)
        ]
        if final is not None:
            metrics.append(Evaluated(len(losses) - 1, final, eval_tokens, 0.1, published))
        events: list[Event] = [
            Started(0, len(losses), 128, str(run.folder)),
            Measured("tensors", peak, peak, [Part("weights", peak // 2, peak // 2)]),
        ]
        if ended:
            tokens = 128 * len(losses)
            events.append(Finished(len(losses), final or 0.0, 6.5, tokens, 3.0, "checkpoint"))
        append(run.folder / METRICS, metrics)
        append(run.folder / EVENTS, events)
        known = {"system": "Linux x86_64", "threads": 1, "torch": "2.13.0"}
        (run.folder / "env.json").write_text(json.dumps(known | (environment or {})))
        if corpus is not None:
            checkpoint = run.checkpoints / f"step-{len(losses):06}"
            checkpoint.mkdir()
            (checkpoint / "manifest.json").write_text("{}")
            (checkpoint / "state.json").write_text(json.dumps({"corpus": corpus}))
        return run.folder

    return make


def append(path: Path, events: Sequence[Event]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(to_record(event)) + "\n" for event in events)
