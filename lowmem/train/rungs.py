"""How far a run has come down the ladder of `ladder.py`; part of its checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager

from typing_extensions import TypedDict

from lowmem.config.schema import BoundaryPlace, Config, Recompute, Size, settled
from lowmem.kernels.slices import smaller_slices
from lowmem.model.llama import Llama


class Rungs(TypedDict):
    """What a run has come down to, as plain JSON.

    slices: the divisor. micro_batch: sequences in training, evaluation: in validation. prepared:
    weights whose states are those of the coming update already (`Slot.prepared`). boundaries: where
    inputs of blocks wait.
    """

    slices: Size
    logits: bool
    recompute: Recompute
    micro_batch: Size
    evaluation: Size
    boundaries: BoundaryPlace
    prepared: list[str]


def rungs_of(config: Config) -> Rungs:
    """Where a run begins: everything as its configuration says."""
    train = config.train
    rows = settled(train.micro_batch)
    return {
        "slices": 1,
        "logits": train.logits == "keep",
        "recompute": settled(train.recompute),
        "micro_batch": rows,
        "evaluation": rows,
        "boundaries": "host" if train.boundaries == "host" else "keep",
        "prepared": [],
    }


@contextmanager
def standing_on(rungs: Rungs, model: Llama) -> Iterator[None]:
    """Make the model, and inside also all slices, what `rungs` says."""
    model.recompute, model.keep_logits = rungs["recompute"], rungs["logits"]
    model.boundaries.where = rungs["boundaries"]
    with smaller_slices(rungs["slices"]):
        yield
