"""Follow recorded weight trajectories: the same weights, gradients and rates, the same result?

    python tests/optim/follow_oracle.py FILE...

prints `file  max_abs_error  tolerance  ok|FAIL` for each, `info` for a file that is recorded for
information only, and exits with 1 if one fails. Names, seeds and options come from the file's own
metadata; `followers/` has one module per method.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, the project is not found

from tests.optim.followers import (
    apollo,
    cosmos,
    eight_bit,
    fira,
    frugal,
    galore,
    lion,
    muon,
    natural_galore,
    q_apollo,
    q_galore,
    schedules,
    sgd_sai,
    soap,
    spam,
)
from tests.optim.followers.oracle import Oracle, Outcome, read_oracle

FOLLOWERS: dict[str, Callable[[Oracle], Outcome]] = {
    "galore": galore.follow,
    "galore8bit": galore.follow,
    "apollo": apollo.follow,
    "apollo_mini": apollo.follow,
    "fira": fira.follow,
    "frugal": frugal.follow,
    "lion": lion.follow,
    "eight_bit_lion": lion.follow,
    "q_galore": q_galore.follow,
    "q_apollo": q_apollo.follow,
    "q_apollo_mini": q_apollo.follow,
    "eight_bit": eight_bit.follow_codes,
    "eight_bit_adamw": eight_bit.follow_adamw,
    "sgd_sai": sgd_sai.follow,
    "spam": spam.follow_spam,
    "stable_spam": spam.follow_stable_spam,
    "schedules": schedules.follow,
    "cosmos": cosmos.follow,
    "muon": muon.follow,
    "natural_galore": natural_galore.follow,
    "soap": soap.follow,
}


def follow(path: Path) -> Outcome:
    """Follow one file. ValueError for a method that this project does not have."""
    oracle = read_oracle(path)
    method = oracle.about["method"]
    if method not in FOLLOWERS:
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(FOLLOWERS)}")
    return FOLLOWERS[method](oracle)


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python tests/optim/follow_oracle.py FILE...", file=sys.stderr)
        return 2
    width = max(len(Path(argument).name) for argument in arguments)
    verdicts = []
    for argument in arguments:
        try:
            outcome = follow(Path(argument))
        except (ValueError, OSError) as error:
            print(f"{Path(argument).name:<{width}}  {error}", file=sys.stderr)
            verdicts.append("FAIL")
            continue
        print(outcome.line(width))
        verdicts.append(outcome.verdict)
    return int(any(verdict.startswith("FAIL") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
