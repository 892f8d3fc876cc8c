"""Follow `apollo__*` and `apollo_mini__*`; `Drawn` puts recorded projections in place of ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.formats import State, number
from lowmem.optim.method import Method, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.random_projectors import RandomNormal
from tests.optim.followers.fira import norm_agrees
from tests.optim.followers.galore import state_differences
from tests.optim.followers.oracle import Oracle, Outcome, Steered, judge, recorded_bases, run

NO_LIMIT = 1e30


def follow(oracle: Oracle) -> Outcome:
    about = oracle.about
    method = build_method(about["method"], options_of(about))
    methods = {**dict.fromkeys(about["regular"], method.other), **recorded(oracle, method.matrix)}
    norms: list[str] = []

    def after(done: int, optimizer: Optimizer) -> None:
        norms.extend(norm_differences(oracle, done, optimizer))

    optimizer, error = run(oracle, methods, after=after)
    return judge(oracle, error, [*norms, *state_differences(oracle, optimizer)])


def options_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The options of apollo and apollo_mini that the metadata names."""
    return {
        "rank": about["rank"],
        "gap": about["gap"],
        "scale": about["scale"],
        "alpha": about["alpha"],
        "scale_front": about["scale_front"],
        "per": about["scale_type"],
        "projection": about["proj"],
        "gamma": about["nl_gamma"] if about["norm_limiter"] else NO_LIMIT,
        "betas": tuple(about["betas"]),
        "eps": about["eps"],
        "bias": "step" if about["correct_bias"] else "off",
        "solver": "eigh",
        "staggered": False,
    }


def recorded(oracle: Oracle, matrix: Method) -> dict[str, Method]:
    """The method of each projected matrix, with the recorded projections (`svd`: their signs)."""
    assert isinstance(matrix, Projected)
    methods: dict[str, Method] = {}
    for name in oracle.about["projected"]:
        steps = oracle.about["refresh_steps"]
        projections = {t: oracle.tensors[f"proj.{t}.{name}"] for t in steps}
        if oracle.about["proj"] == "random":
            assert isinstance(matrix.projector, RandomNormal)
            methods[name] = replace(matrix, projector=Drawn(matrix.projector.rank, projections))
        else:
            methods[name] = Steered(matrix, recorded_bases(projections))
    return methods


def norm_differences(oracle: Oracle, done: int, optimizer: Optimizer) -> list[str]:
    """Keys of limiter norms that are not as recorded after `done` updates."""
    about = oracle.about
    # With scale_front the recorded norm is of the scaled step; the steps are equal.
    factor = about["alpha"] if about["scale_front"] else 1.0
    keys = {f"nlnorm.{done - 1}.{name}": name for name in about["projected"]}
    return [
        key
        for key, name in keys.items()
        if key in oracle.tensors and not norm_agrees(oracle, key, optimizer, name, factor)
    ]


@dataclass(frozen=True)
class Drawn(RandomNormal):
    """Recorded projections by update: (r, s) on the right, (s, r) on the left, any rank."""

    projections: Mapping[int, Tensor] = field(default_factory=dict)

    def init(self, state: State, weight: Tensor, place: Place) -> None:
        super().init(state, weight, place)
        state["rank"], state["drawn_at"] = self.rank, min(self.projections)

    def refresh(self, grad: Tensor, state: State) -> None:
        super().refresh(grad, state)
        state["drawn_at"] = number(state, "step")

    def basis(self, state: State, device: torch.device | str = "cpu") -> Tensor:
        projection = self.projections[number(state, "drawn_at")]
        return (projection.T if state["right"] else projection).to(device)
