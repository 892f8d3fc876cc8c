"""A training step on the meta device, with every byte counted.

The very model and the very optimizer are built on `meta` and run two updates and an evaluation;
`LiveBytes` sees every storage appear and die. The same tracker counts a real step on the CPU, and
both give the same number to the byte.

See docs/memory.md.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.config.schema import (
    BoundaryPlace,
    Ends,
    Matmul,
    ModelConfig,
    OptimizerConfig,
    StatePlace,
    SumFormat,
    UpdateMode,
    WeightFormat,
)
from lowmem.kernels.dispatch import rehearsing
from lowmem.model.llama import Llama, compute_dtype
from lowmem.optim.assign import build_optimizer
from lowmem.optim.blocks import hold_worst_window
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import MadeAnew, gather
from lowmem.phases import phase, sentence
from lowmem.planner.live_bytes import LiveBytes, Segment, ordered
from lowmem.planner.persistent import track_persistent
from lowmem.planner.plan import Choice, PhasePeak

GATHER, STEP, EVALUATE = "forward and backward", "update", "evaluation"

VISITED: dict[UpdateMode, int] = {
    "unfused": 2,
    "fused+subspace": 2,
    "fused": 1,
    # The first, one in the middle, the one before which states are sent for, and the last; what
    # waits between blocks is as large as for all of them.
    "layer-major": 4,
}
"""Micro-batches of a rehearsed update: more would add nothing new."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed update needs; the fields are those of LiveBytes.

    persistent: what lives as long as the run, by part. segments: gather, step and evaluate by name.
    phases: the worst moment of every kind of phase, the highest first. host: bytes of host memory.
    """

    tensors: int
    parts: dict[str, int]
    instant: str
    events: list[tuple[int, int]]
    phases: list[PhasePeak]
    persistent: dict[str, int] = field(default_factory=dict)
    segments: dict[str, Segment] = field(default_factory=dict)
    host: int = 0


def rehearse(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    choice: Choice,
    seq_len: int,
    *,
    attention: str,
    workspace: int = 0,
    updates: int = 1,
) -> Rehearsal:
    """Run updates and an evaluation batch on meta and return their peak.

    attention: the operator that the planned device will use. workspace: bytes that libraries hold
    throughout. updates: every state exists before the first, so a second changes nothing but the
    classic allocator's holes.
    """
    tracker = LiveBytes("meta", scratch=attention != "cpu")
    llama = chosen_model(model, choice, attention)
    with standing_for(attention):
        owner = optimizer_on_meta(llama, optimizer, choice.update, choice.sums, choice.place)
    owner.attach(llama)
    track_persistent(tracker, owner)
    libraries = torch.empty(workspace, dtype=torch.uint8, device="meta")
    tracker.track([libraries], "workspace")
    persistent = tracker.parts()
    with tracker, standing_for(attention):
        for _ in range(updates):
            with tracker.segment(GATHER):
                loss_and_norm = update(llama, owner, choice, seq_len)
            with tracker.segment(STEP):
                owner.step()
            del loss_and_norm  # training reads them after the step
        with tracker.segment(EVALUATE):
            evaluate(llama, choice, seq_len)
    del libraries
    return Rehearsal(
        tracker.peak,
        ordered(tracker.peak_parts),
        sentence(tracker.peak_phase),
        tracker.events,
        tracker.phase_peaks(),
        persistent,
        tracker.segments,
        tracker.host_peak,
    )


def chosen_model(
    model: ModelConfig, choice: Choice, attention: str, recompute: str | None = None
) -> Llama:
    """The model with the choice's settings. recompute: instead of the choice's."""
    return model_on_meta(
        model,
        choice.weights,
        recompute or choice.recompute,
        attention,
        keep_logits=choice.logits == "keep",
        ends=choice.ends,
        boundaries=choice.boundaries,
        blocks=choice.blocks,
        compiled=choice.compiled,
        matmul=choice.matmul,
    )


def model_on_meta(
    model: ModelConfig,
    weights: WeightFormat,
    recompute: str,
    attention: str,
    *,
    keep_logits: bool = False,
    ends: Ends = "exact",
    boundaries: BoundaryPlace = "keep",
    blocks: StatePlace = "device",
    compiled: bool = False,
    matmul: Matmul = "exact",
) -> Llama:
    """The very model that would be trained, without memory."""
    return Llama(
        model,
        dtype=compute_dtype(weights, "cpu" if attention == "cpu" else "cuda"),
        device="meta",
        int8=weights == "int8",
        int8_ends=ends == "int8",
        recompute=recompute,
        keep_logits=keep_logits,
        attention=attention,
        boundaries=boundaries,
        blocks=blocks,
        compiled=compiled,
        matmul=matmul,
    )


def optimizer_on_meta(
    llama: Llama,
    optimizer: OptimizerConfig,
    mode: UpdateMode,
    sums: SumFormat = "fp32",
    place: StatePlace = "device",
) -> Optimizer:
    """Its optimizer, when that holds most."""
    owner = build_optimizer(
        optimizer.model_copy(update={"place": place}),
        llama.weights(),
        llama.roles(),
        mode=mode,
        seed=0,
        head_dim=llama.config.head_dim,
        sums=sums,
    )
    hold_worst_window(owner)
    owner.away = llama.away()
    return owner


def standing_for(attention: str) -> AbstractContextManager[None]:
    """Tensors on meta are cut as on the device that has this attention."""
    return rehearsing("cpu" if attention == "cpu" else "cuda")


def update(
    model: Llama, optimizer: Optimizer, choice: Choice, seq_len: int
) -> tuple[Tensor, Tensor]:
    """The gradients of one update, and its loss and norm; `optimizer.step()` is next."""
    made = min(choice.accumulate, VISITED[choice.update])
    return gather(
        model,
        optimizer,
        MadeAnew(lambda: (_batch(choice.micro_batch, seq_len) for _ in range(made))),
        count=choice.accumulate if choice.update == "layer-major" else made,
        tokens=1,
        lr=0.0,
        clip=choice.clip,
    )


def evaluate(model: Llama, choice: Choice, seq_len: int) -> None:
    """An evaluation batch of the size of a micro-batch."""
    with phase("evaluation"):
        inputs, targets = _batch(choice.micro_batch, seq_len)
        model.loss_sum(inputs, targets)


def _batch(rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    shape = (rows, seq_len)
    return (
        torch.empty(shape, dtype=torch.int64, device="meta"),
        torch.empty(shape, dtype=torch.int64, device="meta"),
    )
