"""Follow `fira__*`."""

from typing import Any

from lowmem.optim.formats import tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import Oracle, Outcome, Steered, judge, recorded_bases, run

LIMITER_TOLERANCE = 1e-5  # relative: a norm of some hundred float32 numbers


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    options: dict[str, Any] = {
        "rank": about["rank"],
        "gap": about["gap"],
        "alpha": about["alpha"],
        "form": about.get("form", "released"),
        "gamma": about["limiter_gamma"],
        "side": about["proj_type"],
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "bias": "step" if about["correct_bias"] else "off",
        "solver": "eigh",
        "staggered": False,
    }
    method = build_method("fira", options)
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.other)
    for name in about["projected"]:
        recorded = {t: oracle.tensors[f"proj.{t}.{name}"] for t in about["refresh_steps"]}
        methods[name] = Steered(method.matrix, recorded_bases(recorded))
    limited = dict.fromkeys(about["projected"], 0)
    norms: list[str] = []

    def after(done: int, optimizer: Optimizer) -> None:
        for name in about["projected"]:
            limited[name] += int(tensor(optimizer.slots[name].state, "log.limited"))
            key = f"limiter_norm.{done}.{name}"
            if key in oracle.tensors and not norm_agrees(oracle, key, optimizer, name):
                norms.append(key)

    _, error = run(oracle, methods, after=after)
    counted = about.get("limiter_triggered", limited)
    return judge(
        oracle, error, [*norms, *(f"limited.{n}" for n in counted if limited[n] != counted[n])]
    )


def norm_agrees(
    oracle: Oracle, key: str, optimizer: Optimizer, name: str, factor: float = 1.0
) -> bool:
    """Is the limiter's norm, times `factor`, the recorded one?"""
    ours = tensor(optimizer.slots[name].state, "limiter_norm").item() * factor
    recorded = oracle.tensors[key].item()
    return abs(ours - recorded) <= LIMITER_TOLERANCE * abs(recorded)
