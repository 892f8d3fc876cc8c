"""Follow `eight_bit__*` (maps and codes) and `eight_bit_adamw__*`."""

from typing import Any

from torch import Tensor

from lowmem.kernels.blockwise import dequantize, dynamic_map, quantize
from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from tests.optim.followers.oracle import (
    TRAJECTORY_TOLERANCE,
    Oracle,
    Outcome,
    codes_agree,
    judge,
    run,
)


def follow_adamw(oracle: Oracle) -> Outcome:
    about = oracle.about
    options: dict[str, Any] = {
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "min_8bit": about["min_8bit_size"],
        "floor_codes": False,
    }
    method = build_method("adam8bit", options)
    optimizer, error = run(oracle, dict.fromkeys(about["shapes"], method.matrix))
    if about["quantizer"] != "nearest":
        return Outcome(oracle.path.name, error, TRAJECTORY_TOLERANCE, "info")
    failures = [
        f"{key}.{name}"
        for name in about["shapes"]
        for key, number in (("exp_avg", 1), ("exp_avg_sq", 2))
        if f"{key}.codes" in optimizer.slots[name].state
        and not codes_agree(
            tensor(optimizer.slots[name].state, f"{key}.codes"),
            oracle.tensors[f"state.{about['T']}.{name}.state{number}"],
        )
    ]
    return judge(oracle, error, failures)


def follow_codes(oracle: Oracle) -> Outcome:
    """Maps, codes, scales and values, all bit for bit."""
    if oracle.about["case"] == "maps":
        pairs = [
            (dynamic_map(signed), oracle.tensors[name])
            for name, signed in (("signed", True), ("unsigned", False))
        ]
    else:
        pairs = [pair for key in oracle.tensors for pair in _quantised(oracle, key)]
    assert pairs, f"{oracle.path} holds nothing to compare"
    errors = [(ours.double() - theirs.double()).abs().max().item() for ours, theirs in pairs]
    return judge(oracle, max(errors), tolerance=0.0)


def _quantised(oracle: Oracle, key: str) -> list[tuple[Tensor, Tensor]]:
    """(ours, recorded) pairs of the input called `key`; none for other keys."""
    kind, _, suffix = key.partition(".")
    if kind != "x":
        return []
    signed = suffix.startswith("signed.")
    codes, absmax = quantize(oracle.tensors[key], signed)
    recorded = {what: oracle.tensors[f"{what}.{suffix}"] for what in ("codes", "absmax", "dequant")}
    return [
        (codes.view(-1), recorded["codes"].view(-1)),
        (absmax, recorded["absmax"]),
        (dequantize(codes, absmax, signed).view(-1), recorded["dequant"].view(-1)),
    ]
