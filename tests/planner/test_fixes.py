"""Which changes are proposed, without rehearsing them."""

from typing import Any

import pytest

from lowmem.config.defaults import settle
from lowmem.config.schema import Config
from lowmem.planner.candidates import Kind
from lowmem.planner.fixes import _variations
from lowmem.planner.hardware import find_card
from lowmem.planner.job import Job
from lowmem.planner.ways import Way


@pytest.mark.parametrize(
    ("method", "weights", "cuda", "proposed"),
    [
        ("adamw", "fp32", True, ["bf16", "int8"]),
        ("adamw", "bf16", True, ["int8"]),
        ("adamw", "int8", True, []),
        ("adamw", "fp32", False, ["int8"]),  # bf16 is slow there
        ("adahessian", "fp32", True, []),  # it measures the Hessian on fp32
    ],
)
def test_smaller_formats_of_the_weights_are_proposed_where_the_method_takes_them(
    method: str, weights: Any, cuda: bool, proposed: list[str]
) -> None:
    given = {"optimizer": {"method": method}, "train": {"weights": weights}}
    config, _ = settle(
        Config.model_validate({"model": "llama-9m", "gpu": "8GB", **given}), cuda=cuda
    )
    job = Job.of(config, find_card("8GB", config.train.device))
    choice = job.choice(Kind(method, None, "fp32", weights), Way("unfused"), "keep", "recompute", 1)
    found = {flags: other.weights for flags, other in _variations(job, choice)}
    assert [flags for flags in found if "--weights" in flags] == [
        f"--weights {w}" for w in proposed
    ]
    assert all(found[f"--weights {w}"] == w for w in proposed)


@pytest.mark.parametrize(
    ("method", "sums", "micro_batches", "cuda", "proposed"),
    [
        ("adamw", "fp32", 8, True, ["int8", "host"]),
        ("adamw", "int8", 8, True, ["host"]),
        ("adamw", "host", 8, True, []),
        ("adamw", "fp32", 8, False, ["int8"]),  # host memory is the device
        ("adamw", "fp32", 1, True, []),  # nothing to sum
        ("sophia", "fp32", 8, True, []),  # it refuses others
    ],
)
def test_coarser_sums_are_proposed_where_there_are_sums(
    method: str, sums: Any, micro_batches: int, cuda: bool, proposed: list[str]
) -> None:
    given = {"optimizer": {"method": method}, "train": {"batch": "8seq"}}
    config, _ = settle(Config.model_validate({"model": "llama-9m", **given}), cuda=cuda)
    job = Job.of(config, find_card("8GB", config.train.device))
    kind = Kind(method, None, "fp32", "fp32", sums=sums)
    choice = job.choice(kind, Way("unfused"), "keep", "recompute", 8 // micro_batches)
    found = {flags: other.sums for flags, other in _variations(job, choice)}
    assert [flags for flags in found if "--sums" in flags] == [f"--sums {s}" for s in proposed]
    assert all(found[f"--sums {s}"] == s for s in proposed)
