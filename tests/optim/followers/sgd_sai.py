"""Follow `sgd_sai__*`."""

from lowmem.optim.methods import build_method
from tests.optim.followers.oracle import Oracle, Outcome, judge, run


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    method = build_method("sgd_sai", {"momentum": about["momentum"], "eps": about["eps"]}).matrix
    _, error = run(oracle, dict.fromkeys(about["shapes"], method))
    return judge(oracle, error)
