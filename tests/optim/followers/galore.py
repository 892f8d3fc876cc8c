"""Follow `galore__*` and `galore8bit__*`."""

from typing import Any

import torch

from lowmem.optim.formats import State, tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import (
    TRAJECTORY_TOLERANCE,
    Oracle,
    Outcome,
    Steered,
    codes_agree,
    judge,
    recorded_bases,
    run,
)


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    eight_bit = about["state_bits"] == 8
    options: dict[str, Any] = {
        "rank": about["rank"],
        "gap": about["gap"],
        "scale": about["scale"],
        "side": about["proj_type"],
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "solver": "eigh",
        "staggered": False,
    }
    if eight_bit:
        # Published codes: the files were recorded without the floor for second moments.
        options |= {"states": "8bit", "min_8bit": about["min_8bit_size"], "floor_codes": False}
    method = build_method("galore", options)
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.other)
    for name in about["projected"]:
        recorded = {t: oracle.tensors[f"proj.{t}.{name}"] for t in about["refresh_steps"]}
        methods[name] = Steered(method.matrix, recorded_bases(recorded))
    optimizer, error = run(oracle, methods)
    failures = state_differences(oracle, optimizer)
    return judge(oracle, error, failures)


def state_differences(oracle: Oracle, optimizer: Optimizer) -> list[str]:
    """Names of final moments that are not the recorded ones."""
    names = [*oracle.about["regular"], *oracle.about["projected"]]
    return [
        f"{key}.{name}"
        for name in names
        for key, number in (("exp_avg", 1), ("exp_avg_sq", 2))
        if not _as_recorded(optimizer.slots[name].state, key, number, oracle, name)
    ]


def _as_recorded(state: State, key: str, number: int, oracle: Oracle, name: str) -> bool:
    if f"{key}.codes" in state:
        recorded = oracle.tensors[f"state.state{number}.{name}"]
        return codes_agree(tensor(state, f"{key}.codes"), recorded)
    in_floats = oracle.tensors.get(f"state.{key}.{name}")
    recorded = oracle.tensors[f"state.state{number}.{name}"] if in_floats is None else in_floats
    return torch.allclose(tensor(state, key), recorded, atol=TRAJECTORY_TOLERANCE)
