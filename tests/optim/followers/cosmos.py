"""Follow `cosmos__*`: weights, and P, S and V where they are recorded."""

from typing import Any

from torch import Tensor

from lowmem.optim.formats import tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import Oracle, Outcome, judge, run

TOLERANCE = 3e-5  # QR and Newton-Schulz amplify rounding
BF16_TOLERANCE = 2e-2  # two groupings of the polynomial differ by 7e-3
FORMS = {"nesterov": "nesterov", "ema": "average"}
BASIS_TOLERANCE = 1e-4  # float32 power iterations, from unit vectors
RELATIVE_TOLERANCE = 1e-4  # of the largest entry of S or V


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    bf16 = about["ns_dtype"] == "bfloat16"
    options: dict[str, Any] = {
        "rank": about["rank"],
        "ratio": about["lr_ratio"],
        "gamma": about["gamma"],
        "momentum_form": FORMS[about["momentum_form"]],
        "betas": tuple(about["betas"][:2]),
        "eps": about["eps"],
        "solver": "eigh",
        "newton_schulz": "bf16" if bf16 else "fp32",
    }
    if len(set(about["betas"][1:])) != 1:
        raise ValueError(f"betas {about['betas']}: S and V have one decay rate here")
    method = build_method("cosmos", options)
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.other)
    methods |= dict.fromkeys(about["matrices"], method.matrix)
    failures: list[str] = []

    def compare(done: int, optimizer: Optimizer) -> None:
        for name in about["matrices"]:
            if f"state.{done}.{name}.P" in oracle.tensors:
                failures.extend(_differences(oracle, done, name, optimizer))

    _, error = run(oracle, methods, after=compare)
    return judge(oracle, error, failures, BF16_TOLERANCE if bf16 else TOLERANCE)


def _differences(oracle: Oracle, done: int, name: str, optimizer: Optimizer) -> list[str]:
    """Names of those of P, S and V that are not the recorded ones, signs of P's columns aside."""
    P, S, V = (oracle.tensors[f"state.{done}.{name}.{letter}"] for letter in "PSV")
    state = optimizer.slots[name].state
    basis = tensor(state, "basis")
    signs = (basis * P).sum(dim=0).sign()
    gram = tensor(state, "gram") * signs * signs.unsqueeze(1)
    found: list[tuple[str, Tensor, Tensor, float]] = [
        ("P", basis * signs, P, BASIS_TOLERANCE),
        ("S", gram, S, RELATIVE_TOLERANCE * S.abs().max().item()),
        ("V", tensor(state, "exp_avg_sq"), V, RELATIVE_TOLERANCE * V.abs().max().item()),
    ]
    return [
        f"{letter}.{done}.{name}"
        for letter, ours, theirs, tolerance in found
        if not (ours - theirs).abs().max().item() <= tolerance
    ]
