"""How long a run will take on this machine, measured: one micro-batch, one step, one refresh.

For cards the planner estimates speed from tables (`planner/speed.py`); a CPU has none, and a run
that is to end in half an hour needs to know.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.config.schema import Config, settled
from lowmem.optim.step import gather
from lowmem.planner.plan import Choice
from lowmem.train.build import build

_EVALUATION = 1 / 3  # of a micro-batch's time: a forward pass without its backward


@dataclass(frozen=True)
class Pace:
    """Seconds. micro_batch: forward and backward. step: of the optimizer. refresh: its extra."""

    micro_batch: float
    step: float
    refresh: float

    def whole(self, config: Config, choice: Choice) -> tuple[float, float]:
        """(seconds that shrink with the run, seconds of all its refreshes, which do not)."""
        updates = settled(config.train.updates)
        every = settled(config.evaluate.every)
        evaluations = 1 + (updates // every if every else 0)
        rows = settled(config.evaluate.tokens) / settled(config.data.seq_len)
        evaluation = rows / choice.micro_batch * self.micro_batch * _EVALUATION
        update = choice.accumulate * self.micro_batch + self.step
        gap = config.optimizer.options.get("gap")
        refreshes = updates / gap if isinstance(gap, int) else 0.0
        return updates * update + evaluations * evaluation, refreshes * self.refresh


def measured_pace(config: Config, clock: Callable[[], float] = time.perf_counter) -> Pace:
    """Two updates of one micro-batch each, of random tokens; the first chooses subspaces.

    Nothing of them is kept. config: planned.
    """
    model, optimizer = build(config)
    model.initialise(config.train.seed)
    shape = settled(config.train.micro_batch), settled(config.data.seq_len)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=random)
    tokens = tokens.to(model.head_weight.device)
    clip = config.train.clip if isinstance(config.train.clip, float) else None

    def timed(work: Callable[[], object]) -> float:
        _wait(tokens)
        began = clock()
        work()
        _wait(tokens)
        return clock() - began

    def forward() -> object:
        pairs = [(tokens, tokens)]
        return gather(model, optimizer, pairs, count=1, tokens=tokens.numel(), lr=1e-6, clip=clip)

    first = timed(forward), timed(optimizer.step)
    second = timed(forward), timed(optimizer.step)
    return Pace(second[0], second[1], max(0.0, sum(first) - sum(second)))


def scale_for(budget: float, shrinks: float, fixed: float) -> float:
    """The share of a run that fits into `budget` seconds, at most 1; 0 or less: nothing does."""
    return min(1.0, (budget - fixed) / shrinks)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
