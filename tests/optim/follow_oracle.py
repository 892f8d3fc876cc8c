"""Follow recorded weight trajectories: the same weights, gradients and rates, the same result?

    python tests/optim/follow_oracle.py FILE...

prints `file  max_abs_error  tolerance  ok|FAIL` for each, `info` for a file that is recorded for
information only, and exits with 1 if one fails. Names, seeds and options come from the file's own
metadata. Signs of singular vectors are arbitrary and moments survive a refresh, so the basis is
chosen by our code, compared with the recorded one up to sign, and given the recorded signs.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowmem.kernels.blockwise import dequantize, dynamic_map, quantize
from lowmem.optim.formats import State, tensor
from lowmem.optim.method import Method, Needs, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.projectors import Rows

TRAJECTORY_TOLERANCE = 1e-5  # weights move by 0.05 to 3; two re-derivations stay within 1e-6
BASIS_TOLERANCE = 2e-4  # float32 singular vectors against ours, which are float64
CODE_SHARE = 0.005  # codes that may differ by one, elsewhere than on an eager CPU


@dataclass(frozen=True)
class Oracle:
    """One file: its metadata and its tensors."""

    path: Path
    about: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What following a file gave. verdict: ok, FAIL or info."""

    name: str
    error: float
    tolerance: float
    verdict: str

    def line(self, width: int) -> str:
        return f"{self.name:<{width}}  {self.error:9.2e}  {self.tolerance:7.1e}  {self.verdict}"


@dataclass(frozen=True)
class FollowBasis:
    """A method whose basis, after each refresh, gets the recorded signs (and must agree)."""

    inner: Projected
    recorded: dict[int, Tensor]  # update -> projection as recorded

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def init(self, weight: Tensor, seed: int) -> State:
        return self.inner.init(weight, seed)

    def refresh(self, grad: Tensor, state: State) -> None:
        self.inner.refresh(grad, state)
        step = state["step"]
        if step not in self.recorded:
            return
        basis = tensor(state, "basis")
        wanted = self.recorded[int(step)]
        wanted = wanted.T if state["right"] else wanted
        basis.mul_((basis * wanted).sum(dim=0).sign())
        distance = (basis - wanted).abs().max().item()
        if distance > BASIS_TOLERANCE:
            raise ValueError(f"basis at update {step} is {distance:.1e} away from the recorded one")

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return self.inner.compress(grad, state)

    def update(self, kept: Tensor, state: State) -> Rows:
        return self.inner.update(kept, state)


def read_oracle(path: Path) -> Oracle:
    """Read a file; ValueError if it carries no metadata."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if "hyperparameters" not in metadata:
            raise ValueError(f"{path} has no 'hyperparameters' in its metadata")
        keys = list(file.keys())
        return Oracle(
            path, json.loads(metadata["hyperparameters"]), {k: file.get_tensor(k) for k in keys}
        )


def follow(path: Path) -> Outcome:
    """Follow one file. ValueError for a method that this project does not have."""
    oracle = read_oracle(path)
    method = oracle.about["method"]
    if method not in FOLLOWERS:
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(FOLLOWERS)}")
    return FOLLOWERS[method](oracle)


def _judge(oracle: Oracle, error: float, tolerance: float, failures: Iterable[str] = ()) -> Outcome:
    ok = error <= tolerance and not list(failures)
    return Outcome(oracle.path.name, error, tolerance, "ok" if ok else "FAIL")


def _follow_galore(oracle: Oracle) -> Outcome:
    about = oracle.about
    eight_bit = about["state_bits"] == 8
    options: dict[str, Any] = {
        "rank": about["rank"],
        "gap": about["gap"],
        "scale": about["scale"],
        "side": about["proj_type"],
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
    }
    if eight_bit:
        # Published codes: the files were recorded without the floor for second moments.
        options |= {"states": "8bit", "min_8bit": about["min_8bit_size"], "floor_codes": False}
    method = build_method("galore", options)
    assert isinstance(method, Projected)
    methods: dict[str, Method] = dict.fromkeys(about["regular"], method.rest)
    for name in about["projected"]:
        methods[name] = FollowBasis(
            method, {t: oracle.tensors[f"proj.{t}.{name}"] for t in about["refresh_steps"]}
        )
    optimizer, error = _run(oracle, methods)
    failures = _compare_galore_state(oracle, optimizer)
    return _judge(oracle, error, TRAJECTORY_TOLERANCE, failures)


def _compare_galore_state(oracle: Oracle, optimizer: Optimizer) -> list[str]:
    """Names of final moments that are not the recorded ones."""
    names = [*oracle.about["regular"], *oracle.about["projected"]]
    if oracle.about["state_bits"] != 8:
        return [
            f"{key}.{name}"
            for name in names
            for key in ("exp_avg", "exp_avg_sq")
            if not torch.allclose(
                tensor(optimizer.slots[name].state, key),
                oracle.tensors[f"state.{key}.{name}"],
                atol=TRAJECTORY_TOLERANCE,
            )
        ]
    return [
        f"{key}.{name}"
        for name in names
        for key, number in (("exp_avg", 1), ("exp_avg_sq", 2))
        if not _codes_agree(
            tensor(optimizer.slots[name].state, f"{key}.codes"),
            oracle.tensors[f"state.state{number}.{name}"],
        )
    ]


def _follow_adamw(oracle: Oracle) -> Outcome:
    about = oracle.about
    options: dict[str, Any] = {
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "min_8bit": about["min_8bit_size"],
        "floor_codes": False,
    }
    method = build_method("adam8bit", options)
    optimizer, error = _run(oracle, dict.fromkeys(about["shapes"], method))
    if about["quantizer"] != "nearest":
        return Outcome(oracle.path.name, error, TRAJECTORY_TOLERANCE, "info")
    failures = [
        f"{key}.{name}"
        for name in about["shapes"]
        for key, number in (("exp_avg", 1), ("exp_avg_sq", 2))
        if f"{key}.codes" in optimizer.slots[name].state
        and not _codes_agree(
            tensor(optimizer.slots[name].state, f"{key}.codes"),
            oracle.tensors[f"state.{about['T']}.{name}.state{number}"],
        )
    ]
    return _judge(oracle, error, TRAJECTORY_TOLERANCE, failures)


def _codes_agree(ours: Tensor, recorded: Tensor) -> bool:
    """At most one code of difference, on at most CODE_SHARE of the elements."""
    distance = (ours.int().view(-1) - recorded.int().view(-1)).abs()
    return bool(distance.max() <= 1) and bool((distance > 0).float().mean() <= CODE_SHARE)


def _run(oracle: Oracle, methods: dict[str, Method]) -> tuple[Optimizer, float]:
    """Feed the recorded gradients through the project's optimizer; largest weight error."""
    about = oracle.about
    weights = {name: oracle.tensors[f"init.{name}"].clone() for name in methods}
    optimizer = Optimizer("unfused", seed=0)
    for name, method in methods.items():
        optimizer.add(name, weights[name], method, about["weight_decay"])
    error = 0.0
    for update in range(about["T"]):
        optimizer.begin(about["lr"][update], micro_batches=1)
        for name in methods:
            optimizer.receive(name, oracle.tensors[f"grad.{update}.{name}"].clone())
        optimizer.step()
        if update + 1 in about["saved_after"]:
            for name, weight in weights.items():
                recorded = oracle.tensors[f"weight.{update + 1}.{name}"]
                error = max(error, (weight - recorded).abs().max().item())
    return optimizer, error


def _follow_eight_bit(oracle: Oracle) -> Outcome:
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
    return _judge(oracle, max(errors), 0.0)


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


FOLLOWERS: dict[str, Callable[[Oracle], Outcome]] = {
    "galore": _follow_galore,
    "galore8bit": _follow_galore,
    "eight_bit": _follow_eight_bit,
    "eight_bit_adamw": _follow_adamw,
}


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
    return int("FAIL" in verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
