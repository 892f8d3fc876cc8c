"""Follow `muon__*`."""

from typing import Any

from lowmem.optim.methods import build_method
from tests.optim.followers.oracle import TRAJECTORY_TOLERANCE, Oracle, Outcome, judge, run

ADJUSTMENTS = {"original": "original", "match_rms_adamw": "match_rms", None: "original"}
BF16_TOLERANCE = 5e-3  # two groupings of the polynomial differ by 2e-3


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    bf16 = about["ns_dtype"] == "bfloat16"
    options: dict[str, Any] = {
        "momentum": about["momentum"],
        "nesterov": about["nesterov"],
        "adjustment": ADJUSTMENTS.get(about["adjust_lr_fn"], about["adjust_lr_fn"]),
        "newton_schulz": "bf16" if bf16 else "fp32",
    }
    method = build_method("muon", options)
    _, error = run(oracle, dict.fromkeys(about["shapes"], method.matrix))
    return judge(oracle, error, tolerance=BF16_TOLERANCE if bf16 else TRAJECTORY_TOLERANCE)
