"""Follow `schedules__*`: the learning rate of every update, in float64."""

from lowmem.config.schema import ScheduleConfig
from lowmem.train.schedule import learning_rate
from tests.optim.followers.oracle import Oracle, Outcome, judge

_TOLERANCE = 1e-12  # float64 against float64


def follow(oracle: Oracle) -> Outcome:
    """Arrays that the file does not have are not compared; it must have one."""
    about = oracle.about
    rex, warmup = about.get("rex", {"max_lr": 1.0, "min_lr": 0.0}), about.get("warmup", 0)
    known = {
        "rex": (
            ScheduleConfig(kind="rex", warmup=0, min_ratio=rex["min_lr"] / rex["max_lr"]),
            rex["max_lr"],
        ),
        "linear": (ScheduleConfig(kind="linear", warmup=warmup, min_ratio=0.0, start="zero"), 1.0),
        "cosine_min10": (
            ScheduleConfig(kind="cosine", warmup=warmup, min_ratio=0.1, start="zero"),
            1.0,
        ),
    }
    unknown = [name for name in oracle.tensors if name not in known]
    errors = [0.0]
    for name, recorded in oracle.tensors.items():
        if name in known:
            schedule, peak = known[name]
            errors += [
                abs(learning_rate(schedule, peak, update, about["T"]) - value)
                for update, value in enumerate(recorded.tolist())
            ]
    return judge(oracle, max(errors), unknown, _TOLERANCE)
