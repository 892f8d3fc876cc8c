"""What all followers share: a recorded file, the run through our optimizer, the verdict.

Signs of singular vectors are arbitrary and moments survive a refresh, so a basis is chosen by our
code, compared with the recorded one, and replaced by it. Random choices are loaded as recorded.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lowmem.kernels.grouped_weight import Weight
from lowmem.optim.formats import State, tensor
from lowmem.optim.method import Method, Needs
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.weights import Step

TRAJECTORY_TOLERANCE = 1e-5  # weights move by 0.05 to 3; two re-derivations stay within 1e-6
BASIS_TOLERANCE = 2e-4  # float32 singular vectors against ours, which are float64
SAME_SPAN = 0.999  # of the overlap |P' P_recorded|^2 / r
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


def judge(
    oracle: Oracle,
    error: float,
    failures: Iterable[str] = (),
    tolerance: float = TRAJECTORY_TOLERANCE,
) -> Outcome:
    """ok if the error is within tolerance and nothing else failed; failures are named."""
    failed = list(failures)
    ok = error <= tolerance and not failed  # a NaN is not
    note = f"  ({', '.join(failed[:4])})" if failed else ""
    return Outcome(oracle.path.name, error, tolerance, "ok" if ok else f"FAIL{note}")


Settle = Callable[[int, State], None]
"""settle(update, state): replace what our refresh has just chosen by what was recorded."""


@dataclass(frozen=True)
class Steered:
    """A method whose subspace, after each refresh, is settled from the recording."""

    inner: Method
    settle: Settle

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def init(self, weight: Tensor, place: Place) -> State:
        return self.inner.init(weight, place)

    def refresh(self, grad: Tensor, state: State) -> None:
        self.inner.refresh(grad, state)
        self.settle(int(state["step"]), state)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return self.inner.compress(grad, state)

    def update(self, kept: Tensor, state: State) -> Step | None:
        return self.inner.update(kept, state)


def take_recorded(ours: Tensor, wanted: Tensor, what: str) -> None:
    """Put the recorded vectors (s, r) in place of ours. ValueError if ours are others.

    They agree if they are the same up to sign or, where close singular values make the single
    vectors arbitrary, span the same.
    """
    if ours.shape != wanted.shape:
        raise ValueError(f"{what} is {tuple(ours.shape)}, recorded as {tuple(wanted.shape)}")
    signs = (ours * wanted).sum(dim=0).sign()
    distance = (ours * signs - wanted).abs().max().item() if ours.numel() else 0.0
    overlap = (wanted.T @ ours).square().sum().item() / max(1, ours.shape[1])
    if distance > BASIS_TOLERANCE and overlap < SAME_SPAN:
        raise ValueError(f"{what} is {distance:.1e} away from the recorded one")
    ours.copy_(wanted)


def recorded_bases(recorded: Mapping[int, Tensor]) -> Settle:
    """Take the recorded bases. ValueError where ours is another.

    recorded: update -> projection as recorded, (r, s) on the right, (s, r) on the left.
    """

    def settle(update: int, state: State) -> None:
        if update in recorded:
            wanted = recorded[update].T if state["right"] else recorded[update]
            take_recorded(tensor(state, "basis"), wanted, f"the basis at update {update}")

    return settle


def run(
    oracle: Oracle,
    methods: Mapping[str, Method],
    places: Mapping[str, Place] | None = None,
    after: Callable[[int, Optimizer], None] = lambda done, optimizer: None,
    weights: Mapping[str, Weight] | None = None,
    undecayed: Sequence[str] = (),
) -> tuple[Optimizer, float]:
    """Feed the recorded gradients through the project's optimizer; largest weight error.

    after(updates done, optimizer) is called after each update, to compare more. weights: those
    that do not begin as float tensors. undecayed: those without weight decay.
    """
    about = oracle.about
    started = {name: oracle.tensors[f"init.{name}"].clone() for name in methods}
    weights = started | dict(weights or {})
    optimizer = Optimizer("unfused", seed=0)
    for index, (name, method) in enumerate(methods.items()):
        place = (places or {}).get(name, replace(Place(), index=index, count=len(methods)))
        decay = 0.0 if name in undecayed else about["weight_decay"]
        optimizer.add(name, weights[name], method, decay, place)
    error = 0.0
    for update in range(about["T"]):
        optimizer.begin(about["lr"][update], micro_batches=1)
        for name in methods:
            optimizer.receive(name, oracle.tensors[f"grad.{update}.{name}"].clone())
        optimizer.step()
        after(update + 1, optimizer)
        if update + 1 in about["saved_after"]:
            for name, weight in weights.items():
                recorded = oracle.tensors[f"weight.{update + 1}.{name}"]
                distance = _distance(weight, recorded)
                error = max(error, distance) if distance == distance else float("inf")
    return optimizer, error


def _distance(weight: Weight, recorded: Tensor) -> float:
    """The largest error; of a weight in codes, without CODE_SHARE of its elements.

    Those may be a code off, and where one was the largest of its group, the group's scale moves.
    """
    if isinstance(weight, Tensor):
        return (weight - recorded).abs().max().item()
    errors, _ = (weight.values() - recorded).abs().view(-1).sort()
    return errors[-1 - int(CODE_SHARE * len(errors))].item()


def codes_agree(ours: Tensor, recorded: Tensor) -> bool:
    """At most one code of difference, on at most CODE_SHARE of the elements."""
    distance = (ours.int().view(-1) - recorded.int().view(-1)).abs()
    return bool(distance.max() <= 1) and bool((distance > 0).float().mean() <= CODE_SHARE)
