"""Other forms of what was asked, for where it does not fit as it is.

Each changes what the user left open: the format of embedding and head, the order of an update, and
what of it lies in host memory.
"""

from dataclasses import replace
from typing import Any

from lowmem.config.schema import MOVE_EARLY
from lowmem.planner.candidates import families
from lowmem.planner.job import Job
from lowmem.planner.ways import curvatures


def forms_of(job: Job) -> list[Job]:
    """The job; with int8 embedding and head; in layer-major order; then what takes host memory,
    the least traffic first: block inputs there, sums there, both."""
    forms = resident_forms(job)
    order = _layer_major(job)
    inputs = [away for form in forms if (away := _inputs_away(form)) is not None]
    sums = [away for form in (*forms, *inputs) if (away := _on_host(form)) is not None]
    return [*forms, *([] if order is None else [order]), *inputs, *sums]


def resident_forms(job: Job) -> list[Job]:
    return [form for form in (job, _coarser(job)) if form is not None]


def _coarser(job: Job) -> Job | None:
    """The same job with everything in int8 that can be, None where the user wants it otherwise."""
    train = job.config.train
    if train.device != "cuda" or train.ends != "auto" or train.weights not in ("auto", "int8"):
        return None
    return _with(job, ends="int8", weights="int8")


def _layer_major(job: Job) -> Job | None:
    """The same job in layer-major order, None where the user wants it otherwise.

    It takes no host memory where nobody has said that there is some to spare.
    """
    train, optimizer = job.config.train, job.config.optimizer
    if train.update != "auto" or job.rows == 1 or train.sums not in ("auto", "fp32"):
        return None
    if "host" in (train.blocks, optimizer.place):
        return None
    if isinstance(train.clip, float) or train.recompute not in ("auto", "full"):
        return None
    if _follows_curvature(job):
        return None
    boundaries = "keep" if train.boundaries == "auto" else train.boundaries
    places = {"boundaries": boundaries, "blocks": "device"}
    train = train.model_copy(update={"update": "layer-major", **places})
    optimizer = optimizer.model_copy(update={"place": "device"})
    config = job.config.model_copy(update={"train": train, "optimizer": optimizer})
    return replace(job, config=config)


def _inputs_away(job: Job) -> Job | None:
    """The same job with block inputs in host memory, None where that is no choice."""
    train = job.config.train
    if train.device != "cuda" or train.boundaries != "auto" or train.update == "layer-major":
        return None
    if train.blocks == "host" or job.model.num_hidden_layers == 1:
        return None
    return _with(job, boundaries="host")


def _on_host(job: Job) -> Job | None:
    """The same job with sums in host memory, None where the user wants it otherwise."""
    train = job.config.train
    if train.device != "cuda" or train.sums != "auto" or job.rows == 1:
        return None
    if train.update in MOVE_EARLY or train.blocks == "host" or _follows_curvature(job):
        return None
    return _with(job, sums="host")


def _follows_curvature(job: Job) -> bool:
    return bool(curvatures(families(job.config, job.model)[0].least, job.config.optimizer))


def _with(job: Job, **train: Any) -> Job:
    settings = job.config.train.model_copy(update=train)
    return replace(job, config=job.config.model_copy(update={"train": settings}))
