"""Follow `spam__*` and `stable_spam__*`."""

from typing import Any

from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from tests.optim.followers.oracle import Oracle, Outcome, judge, run


def follow_spam(oracle: Oracle) -> Outcome:
    about = oracle.about
    if about.get("density", 1) != 1:
        raise ValueError(f"density {about['density']}: only the dense form is offered")
    return _follow(
        oracle,
        "spam",
        {
            "threshold": about["threshold"],
            "period": about["DeltaT"],
            "settle": about["grad_accu_steps"],
            "warmup": about["warmup_steps"],
        },
    )


def follow_stable_spam(oracle: Oracle) -> Outcome:
    about = oracle.about
    first = about["betas"][0] if about["gamma1"] == -1 else about["gamma1"]  # as released
    return _follow(
        oracle,
        "stable_spam",
        {
            "gammas": (first, about["gamma2"], about["gamma3"]),
            "period": about["update_proj_gap"] or 0,
            "total": about["total_T"] or 0,
            "eta_min": about["eta_min"],
            "released_order": True,
        },
    )


def _follow(oracle: Oracle, name: str, options: dict[str, Any]) -> Outcome:
    shared = {"betas": tuple(oracle.about["betas"]), "eps": oracle.about["eps"]}
    matrix: Method = build_method(name, shared | options).matrix
    _, error = run(oracle, dict.fromkeys(oracle.about["shapes"], matrix))
    return judge(oracle, error)
