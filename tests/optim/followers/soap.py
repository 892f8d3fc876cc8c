"""Follow `soap__*`."""

from typing import Any

from lowmem.optim.methods import build_method
from tests.optim.followers.oracle import Oracle, Outcome, judge, run

TOLERANCE = 3e-5  # QR amplifies rounding


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    own_beta = about["shampoo_beta"] >= 0  # below: b2
    options: dict[str, Any] = {
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "frequency": about["precondition_frequency"],
        "max_dim": about["max_precond_dim"],
        "shampoo_beta": about["shampoo_beta"] if own_beta else None,
        "normalize": about.get("normalize_grads", False),
    }
    method = build_method("soap", options)
    methods = {
        name: method.matrix if len(shape) == 2 else method.other
        for name, shape in about["shapes"].items()
    }
    _, error = run(oracle, methods)
    return judge(oracle, error, tolerance=TOLERANCE)
