"""What would make a plan smaller: one change at a time, with the bytes it saves."""

from collections.abc import Iterator
from dataclasses import replace

from lowmem.config.schema import SumFormat, UpdateMode
from lowmem.optim.methods import method_spec
from lowmem.planner.job import Job, kind_of
from lowmem.planner.plan import Choice, Fix, Memory
from lowmem.planner.ways import curvatures, sums_projected

MOST = 4


def fixes(job: Job, choice: Choice, memory: Memory) -> Iterator[Fix]:
    """Changes that help, those that suffice and the largest gain first; at most MOST."""
    found = []
    for flags, other in _variations(job, choice):
        peak = job.peak(other)
        if peak < memory.reserved:
            fits = peak <= job.card.usable_bytes
            found.append(Fix(flags, memory.reserved - peak, fits))
    if job.card.others and job.card.source == "preset":
        fits = memory.reserved <= job.card.usable_bytes + job.card.others
        found.append(Fix("--others 0MiB", job.card.others, fits))
    yield from sorted(found, key=lambda fix: (not fix.fits, -fix.saves))[:MOST]


def _variations(job: Job, choice: Choice) -> Iterator[tuple[str, Choice]]:
    """(flags, choice with that one change); what the user fixed otherwise stays as it is."""
    train = job.config.train
    subspace: UpdateMode = "fused+subspace"
    asked = curvatures(kind_of(choice), job.config.optimizer)  # these take no other mode
    free = choice.update == "unfused" and train.update == "auto" and not asked
    mode = subspace if free else choice.update
    rank = max(4, job.model.hidden_size // 8)
    if choice.rank is None:
        small = replace(choice, method="galore", rank=rank, states="8bit", update=mode)
        if set(job.config.optimizer.options) <= set(method_spec("galore").arguments):
            yield f"--method galore --rank {rank} --states 8bit", small
    elif isinstance(choice.rank, int) and choice.rank > 8:
        yield f"--rank {choice.rank // 2}", replace(choice, rank=choice.rank // 2)
    if choice.method == "adamw":
        yield "--method adam8bit", replace(choice, method="adam8bit", states="8bit")
    elif choice.states != "8bit" and "8bit" in method_spec(choice.method).states:
        yield "--states 8bit", replace(choice, states="8bit")
    summed = not asked and sums_projected(kind_of(choice), job.config.optimizer)
    if choice.update == "unfused" and summed:
        yield f"--update {subspace}", replace(choice, update=subspace)
    if choice.accumulate > 1 and not asked and choice.update != "layer-major":
        for sums in _coarser_sums(choice.sums, train.device):
            yield f"--sums {sums}", replace(choice, sums=sums)
    if job.rows > 1 and train.update == "auto" and train.device == "cuda" and not asked:
        flags = "--update layer-major --boundaries host --place host --blocks host --clip off"
        yield flags, _layer_major(choice, job.rows)
    within = choice.update != "layer-major" and train.device == "cuda"
    if within and choice.boundaries == "keep" and job.model.num_hidden_layers > 1:
        yield "--boundaries host", replace(choice, boundaries="host")
    if choice.recompute != "full":
        yield "--recompute full", replace(choice, recompute="full")
    if choice.micro_batch > 1 and choice.update != "fused":
        yield "--micro-batch 1", replace(choice, micro_batch=1, accumulate=job.rows)
    if job.rows > 1 and train.micro_batch == "auto" and not asked:
        yield "--batch 1seq --update fused --clip off", _single(choice)
    if "hutchinson" in asked:  # these take no other weights
        return
    if choice.weights == "fp32" and train.device == "cuda":
        yield "--weights bf16", replace(choice, weights="bf16")
    if choice.weights != "int8":
        yield "--weights int8", replace(choice, weights="int8")
    elif choice.ends == "exact":
        yield "--ends int8", replace(choice, ends="int8")


def _coarser_sums(sums: SumFormat, device: str) -> list[SumFormat]:
    """What saves more; host memory is none beside a CPU's."""
    formats: list[SumFormat] = ["int8", "host"] if device == "cuda" else ["int8"]
    return formats[formats.index(sums) + 1 :] if sums in formats else formats


def _layer_major(choice: Choice, rows: int) -> Choice:
    """With everything in host memory that can be there."""
    return replace(
        choice,
        update="layer-major",
        recompute="full",
        logits="recompute",
        clip=None,
        micro_batch=1,
        accumulate=rows,
        sums="fp32",
        boundaries="host",
        place="host",
        blocks="host",
    )


def _single(choice: Choice) -> Choice:
    return replace(choice, micro_batch=1, accumulate=1, update="fused", clip=None)
