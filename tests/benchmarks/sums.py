"""What rounded sums of gradients cost: their error, and the loss of short runs.

    lowmem data prepare sample --out corpus
    python tests/benchmarks/sums.py corpus

llama-tiny (float32 weights). First, gradients of 64 micro-batches of 128 tokens, of new weights and
of those after a run: |sum - float32 sum| / |float32 sum|, all weights together, for sums of 4, 16
and 64 of them. "nearest" is bf16 without noise, what PyTorch does where `.grad` is bf16. Then runs
of 50 updates of 16 such micro-batches from the same start on the same tokens, clipped at 1.0.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem.config.presets import read_preset
from lowmem.config.schema import OptimizerConfig, ScheduleConfig, SumFormat, UpdateMode
from lowmem.data.batches import Batches
from lowmem.data.shards import Corpus, open_corpus
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather
from lowmem.train.evaluate import evaluate
from lowmem.train.schedule import learning_rate

UPDATES, ROWS, MICRO, SEQ_LEN = 50, 16, 1, 128
EVALUATION_TOKENS = 50_000
COUNTS = (4, 16, 64)
FORMATS: tuple[SumFormat, ...] = ("fp32", "bf16", "int8")
RUNS: tuple[tuple[str, UpdateMode, int, dict[str, Any]], ...] = (
    ("adamw", "unfused", 0, {"method": "adamw", "lr": 0.004}),
    ("galore", "fused+subspace", 0, {"method": "galore", "rank": 32, "gap": 10, "lr": 0.01}),
)


def optimizer_of(
    model: Llama, settings: dict[str, Any], mode: UpdateMode, seed: int, sums: SumFormat
) -> Optimizer:
    return build_optimizer(
        OptimizerConfig.model_validate(settings),
        dict(model.named_parameters()),
        model.roles(),
        mode=mode,
        seed=seed,
        head_dim=model.config.head_dim,
        sums=sums,
    )


@dataclass
class Tee:
    """A model's gradients, handed to several optimizers, and summed in bf16 to nearest."""

    optimizers: list[Optimizer]
    nearest: dict[str, Tensor] = field(default_factory=dict)

    def receive(self, name: str, gradient: Tensor) -> None:
        self._nearest(name, 0, gradient)
        for optimizer in self.optimizers:
            optimizer.receive(name, gradient.clone())

    def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
        self._nearest(name, start, rows)
        for optimizer in self.optimizers:
            optimizer.receive_rows(name, start, rows.clone())

    def _nearest(self, name: str, start: int, rows: Tensor) -> None:
        shape = self.optimizers[0].slots[name].weight.shape
        total = self.nearest.setdefault(name, torch.zeros(shape, dtype=torch.bfloat16))
        total[start : start + len(rows)].add_(rows.bfloat16())


def kept(optimizer: Optimizer) -> dict[str, Tensor]:
    pieces = {name: slot.kept for name, slot in optimizer.slots.items()}
    return {
        name: piece if isinstance(piece, Tensor) else piece.whole()
        for name, piece in pieces.items()
        if piece is not None
    }


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    off = sum((found[name].double() - exact[name].double()).square().sum() for name in exact)
    return float((off / sum(each.double().square().sum() for each in exact.values())) ** 0.5)


def errors(model: Llama, corpus: Corpus) -> Iterator[tuple[int, dict[str, float]]]:
    """(micro-batches, relative error by format)."""
    assert corpus.train is not None
    batches = Batches(corpus.train, seq_len=SEQ_LEN, rows_per_update=MICRO * COUNTS[-1], seed=5)
    adamw = {"method": "adamw", "lr": 0.0}
    optimizers = {sums: optimizer_of(model, adamw, "unfused", 0, sums) for sums in FORMATS}
    for optimizer in optimizers.values():
        optimizer.begin(0.0, COUNTS[-1])
    model.sink = tee = Tee(list(optimizers.values()))
    batch = batches.of(0)
    for number, (inputs, targets) in enumerate(batch.micro_batches(MICRO), 1):
        model.loss(inputs, targets, batch.tokens).backward()
        if number in COUNTS:
            exact = kept(optimizers["fp32"])
            found = {"nearest": error(tee.nearest, exact)}
            found |= {str(sums): error(kept(optimizers[sums]), exact) for sums in FORMATS[1:]}
            yield number, found


def run(
    corpus: Corpus, settings: dict[str, Any], mode: UpdateMode, seed: int, sums: SumFormat
) -> tuple[Llama, float]:
    """One training: the model and its validation loss."""
    assert corpus.train is not None
    assert corpus.validation is not None
    model = Llama(read_preset("llama-tiny"), dtype=torch.float32, device="cpu")
    model.initialise(seed)
    optimizer = optimizer_of(model, settings, mode, seed, sums)
    optimizer.attach(model)
    batches = Batches(corpus.train, seq_len=SEQ_LEN, rows_per_update=ROWS, seed=seed)
    for update in range(UPDATES):
        batch = batches.of(update)
        micro = list(batch.micro_batches(MICRO))
        lr = learning_rate(ScheduleConfig(), settings["lr"], update, UPDATES)
        gather(model, optimizer, micro, count=len(micro), tokens=batch.tokens, lr=lr, clip=1.0)
        optimizer.step()
    result = evaluate(model, corpus.validation, seq_len=SEQ_LEN, tokens=EVALUATION_TOKENS)
    return model, result.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    corpus = open_corpus(given.corpus)
    new = Llama(read_preset("llama-tiny"), dtype=torch.float32, device="cpu")
    new.initialise(0)
    print("| weights | micro-batches | bf16, nearest | bf16 | int8 |\n|---|---|---|---|---|")
    print_errors("new", new, corpus)
    print("\n| run | seed | fp32 | bf16 | int8 |\n|---|---|---|---|---|")
    for method, mode, seed, settings in RUNS:
        losses = {}
        for sums in FORMATS:
            model, losses[sums] = run(corpus, settings, mode, seed, sums)
            if sums == "fp32" and (method, seed) == ("adamw", 0):
                print_errors(f"after {UPDATES} updates", model, corpus)
        found = " | ".join(f"{loss:.4f}" for loss in losses.values())
        print(f"| {method}, {mode} | {seed} | {found} |", flush=True)


def print_errors(weights: str, model: Llama, corpus: Corpus) -> None:
    for count, found in errors(model, corpus):
        print(f"| {weights} | {count} | " + " | ".join(f"{x:.2%}" for x in found.values()) + " |")


if __name__ == "__main__":
    main()
