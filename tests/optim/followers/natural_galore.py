"""Follow `natural_galore__*`: weights, moments, and the natural gradients that are recorded."""

from typing import Any

import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import (
    TRAJECTORY_TOLERANCE,
    Oracle,
    Outcome,
    Settle,
    Steered,
    judge,
    recorded_bases,
    run,
    take_recorded,
)

RELATIVE_TOLERANCE = 1e-4  # of the largest entry: u is worked out from float32 moments


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    options: dict[str, Any] = {
        "rank": about["rank"],
        "gap": about["gap"],
        "scale": about["scale"],
        "two_sided": about["two_sided"],
        "history": about["history"],
        "lam": about["damping"],
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "solver": "eigh",
        "staggered": False,
    }
    method = build_method("natural_galore", options)
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.other)
    for name in about["projected"]:
        methods[name] = Steered(method.matrix, _signs(oracle, name))
    failures: list[str] = []
    before: dict[str, Tensor] = {}

    def compare(done: int, optimizer: Optimizer) -> None:
        for name in about["projected"]:
            exp_avg = tensor(optimizer.slots[name].state, "exp_avg")
            old = before.get(name, torch.zeros_like(exp_avg))
            before[name] = exp_avg.clone()
            recorded = oracle.tensors.get(f"natgrad.{done - 1}.{name}")
            if recorded is None:
                continue
            first = about["betas"][0]
            natural = (exp_avg - first * old) / (1 - first)
            if not _close(natural, recorded.view(natural.shape)):
                failures.append(f"natgrad.{done - 1}.{name}")

    optimizer, error = run(oracle, methods, after=compare)
    failures += [
        f"{key}.{name}"
        for name in methods
        for key in ("exp_avg", "exp_avg_sq")
        if not _close(
            tensor(optimizer.slots[name].state, key), oracle.tensors[f"state.{key}.{name}"]
        )
    ]
    return judge(oracle, error, failures, TRAJECTORY_TOLERANCE)


def _close(ours: Tensor, recorded: Tensor) -> bool:
    largest = recorded.abs().max().item()
    return (ours - recorded).abs().max().item() <= RELATIVE_TOLERANCE * largest


def _signs(oracle: Oracle, name: str) -> Settle:
    updates = oracle.about["refresh_steps"]
    if not oracle.about["two_sided"]:
        return recorded_bases({t: oracle.tensors[f"proj.{t}.{name}"] for t in updates})

    def settle(update: int, state: State) -> None:
        for side in ("left", "right") if update in updates else ():
            basis = tensor(state, f"{side}.basis")
            wanted = oracle.tensors[f"proj.{update}.{name}.{side}"]
            take_recorded(basis, wanted, f"the {side} basis at update {update}")

    return settle
