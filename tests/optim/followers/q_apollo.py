"""Follow `q_apollo__*` and `q_apollo_mini__*`: APOLLO with 8-bit weights as recorded."""

from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.apollo import norm_differences, options_of, recorded
from tests.optim.followers.galore import state_differences
from tests.optim.followers.grouped import Grouped
from tests.optim.followers.oracle import Oracle, Outcome, judge, run


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    options = {key: value for key, value in options_of(about).items() if key != "bias"}
    name = "q_apollo_mini" if about["rank"] == 1 else "q_apollo"  # recorded as one method
    method = build_method(name, options)
    methods = {**dict.fromkeys(about["regular"], method.other), **recorded(oracle, method.matrix)}
    grouped = Grouped(oracle)
    norms: list[str] = []

    def after(done: int, optimizer: Optimizer) -> None:
        grouped.after(done, optimizer)
        norms.extend(norm_differences(oracle, done, optimizer))

    # The released optimizer hands 0 as decay of plain parameters to its kernel.
    optimizer, error = run(
        oracle, methods, after=after, weights=grouped.weights, undecayed=about["regular"]
    )
    failures = [*norms, *grouped.differences, *state_differences(oracle, optimizer)]
    return judge(oracle, error, failures)
