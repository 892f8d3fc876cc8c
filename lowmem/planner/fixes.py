"""What would make a plan smaller: one change at a time, with the bytes it saves."""

from collections.abc import Iterator
from dataclasses import replace

from lowmem.optim.assign import takes_rank
from lowmem.planner.job import Job
from lowmem.planner.plan import Choice, Fix, Memory

MOST = 4


def fixes(job: Job, choice: Choice, memory: Memory) -> Iterator[Fix]:
    """Changes that help, the largest gain first; at most MOST."""
    found = []
    for flags, other in _variations(job, choice):
        peak = job.peak(other)
        if peak < memory.reserved:
            fits = peak <= job.card.usable_bytes
            found.append(Fix(flags, memory.reserved - peak, fits))
    yield from sorted(found, key=lambda fix: -fix.saves)[:MOST]


def _variations(job: Job, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """(flags, choice with that one change)."""
    rank = max(4, job.model.hidden_size // 8)
    mode = "fused+subspace" if choice.update == "unfused" else choice.update
    galore = replace(choice, method="galore", rank=rank, states="8bit", update=mode)
    yield f"--method galore --rank {rank} --states 8bit", galore
    if choice.states != "8bit":
        if choice.method == "adamw":
            yield "--method adam8bit", replace(choice, method="adam8bit", states="8bit")
        else:
            yield "--states 8bit", replace(choice, states="8bit")
    if choice.update == "unfused" and takes_rank(choice.method):
        yield "--update fused+subspace", replace(choice, update="fused+subspace")
    if choice.recompute != "full":
        yield "--recompute full", replace(choice, recompute="full")
    if choice.micro_batch > 1 and choice.update != "fused":
        yield "--micro-batch 1", replace(choice, micro_batch=1, accumulate=job.rows)
    if choice.weights == "fp32" and job.config.train.device == "cuda":
        yield "--weights bf16", replace(choice, weights="bf16")
