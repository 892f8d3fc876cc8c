"""How long training stands still for a save, beside `torch.save` of the same state, in one run.

    python tests/benchmarks/saving.py [--model llama-130m] [--method galore] [--saves 5]

The memory of the copy is made behind the first updates, as in a run. Medians over the saves;
`torch.save` writes the same tensors to the same disk, once with and once without a sync.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lowmem.config.defaults import settle
from lowmem.config.schema import Config
from lowmem.data.batches import Batches
from lowmem.data.sample import sample_corpus
from lowmem.train import checkpoint
from lowmem.train.build import build
from lowmem.train.disk import Patience
from lowmem.train.events import Event, Saved
from lowmem.train.guard import StopRequest
from lowmem.train.run import Run
from lowmem.train.saver import Saver
from lowmem.train.snapshot import Position
from lowmem.units import MIB


def torch_save(state: dict[str, torch.Tensor], path: Path, *, sync: bool) -> float:
    began = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    spent = time.perf_counter() - began
    path.unlink()
    return spent


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="llama-130m")
    arguments.add_argument("--method", default="galore")
    arguments.add_argument("--saves", type=int, default=5)
    given = arguments.parse_args()
    corpus = sample_corpus()
    assert corpus.train is not None
    with tempfile.TemporaryDirectory() as folder:
        config, _ = settle(
            Config.model_validate(
                {
                    "model": given.model,
                    "optimizer": {"method": given.method, "rank": 256, "lr": 0.01},
                    "train": {"micro_batch": 1, "update": "unfused", "recompute": "keep"},
                    "run": {"out": folder, "name": "a"},
                    "checkpoint": {"keep": 1},
                }
            ),
            cuda=torch.cuda.is_available(),
        )
        run = Run.create(config, None)
        model, optimizer = build(run.config)
        model.initialise(0)
        batches = Batches(corpus.train, seq_len=256, rows_per_update=8, seed=0)
        events: list[Event] = []
        pairs = [*model.named_parameters(), *optimizer.state_tensors()]
        state = {name: tensor.detach() for name, tensor in pairs}
        unsynced, synced = [], []
        with Saver(run, Patience(run, events.append, StopRequest()), behind=True) as saver:
            saver.prepare(
                lambda: checkpoint.capture(run, model, optimizer, batches, corpus, Position())
            )
            time.sleep(10)  # of training, in which the memory of the copy is made
            for update in range(1, given.saves + 1):
                at = Position(update)
                saver.save(
                    lambda at=at: checkpoint.capture(run, model, optimizer, batches, corpus, at)  # type: ignore[misc]
                )
                saver.finish()  # not while torch.save is timed
                unsynced.append(torch_save(state, Path(folder) / "torch", sync=False))
                synced.append(torch_save(state, Path(folder) / "torch", sync=True))
        saved = [event for event in events if isinstance(event, Saved)]
        first, later = saved[0], saved[1:]
        # `finish` above waited for the writer, which training does not: its time is taken off.
        blocked = [event.blocked - event.seconds for event in later]
        plain = statistics.median(unsynced)
        print(f"{given.model} {given.method}, {first.bytes / MIB:.0f} MiB, {given.saves} saves")
        print("| | seconds | of torch.save |\n|---|---|---|")
        for what, seconds in (
            ("torch.save", plain),
            ("torch.save, synced", statistics.median(synced)),
            ("blocked, first save", first.blocked - first.seconds),
            ("blocked, later saves", statistics.median(blocked)),
            ("written behind, hashed and synced", statistics.median(e.seconds for e in later)),
        ):
            print(f"| {what} | {seconds:.3f} | {seconds / plain:.2f} |")


if __name__ == "__main__":
    main()
