"""The same movement as the authors' own packages, given their projections."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, tensor
from lowmem.optim.method import ByRole, Method, Projected
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.apollo import NO_LIMIT, Drawn
from tests.optim.followers.oracle import Settle, Steered

SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (24, 24), "row": (1, 9), "bias": (16,)}
MATRICES = ("tall", "wide", "square", "row")
UPDATES, GAP = 24, 7
LR, DECAY = 0.01, 0.1
Projections = dict[str, dict[int, Tensor]]


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: 0.02 * torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def gradients() -> Iterator[dict[str, Tensor]]:
    """They grow and shrink, so that the limiter acts in some updates and not in others."""
    generator = torch.Generator().manual_seed(2)
    for update in range(UPDATES):
        size = 3.0 if update % 5 == 2 else 0.5
        yield {n: size * torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def run_theirs(
    kind: Any, group: dict[str, Any], **how: Any
) -> tuple[dict[str, Tensor], Projections]:
    """Final weights, and the projection of every matrix at each refresh."""
    weights = {name: weight.requires_grad_() for name, weight in start().items()}
    own = {"params": [weights[name] for name in MATRICES], "update_proj_gap": GAP} | group
    reference = kind([{"params": [weights["bias"]]}, own | {"proj_type": "std"}], **how)
    projections: Projections = {name: {} for name in MATRICES}
    for update, batch in enumerate(gradients()):
        for name, weight in weights.items():
            weight.grad = batch[name].clone()
        reference.step()
        if update % GAP == 0:
            for name in MATRICES:
                matrix = reference.state[weights[name]]["projector"].ortho_matrix
                projections[name][update] = matrix.detach().clone()
    return {name: weight.detach() for name, weight in weights.items()}, projections


def run_ours(methods: dict[str, Method]) -> dict[str, Tensor]:
    weights = start()
    optimizer = Optimizer("unfused", seed=0)
    for name, weight in weights.items():
        optimizer.add(name, weight, methods[name], DECAY)
    for batch in gradients():
        optimizer.begin(LR, 1)
        for name, grad in batch.items():
            optimizer.receive(name, grad)
        optimizer.step()
    return weights


def assert_same_movement(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, before in start().items():
        moved = (theirs[name] - before).norm()
        # 24 updates in float32, in another order of operations, stay below 5e-7.
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * moved, name


def with_bases(method: ByRole, projections: Projections) -> dict[str, Method]:
    """The methods by weight; matrices take the given singular vectors instead of their own."""
    methods = dict.fromkeys(SHAPES, method.other)
    for name, recorded in projections.items():
        methods[name] = Steered(method.matrix, _basis_from(recorded))
    return methods


def _basis_from(recorded: dict[int, Tensor]) -> Settle:
    def settle(update: int, state: State) -> None:
        if update in recorded:
            theirs = recorded[update]
            tensor(state, "basis").copy_(theirs.T if state["right"] else theirs)

    return settle


@pytest.mark.parametrize("alpha", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_fira_moves_as_the_package_does(alpha: float, correct_bias: bool) -> None:
    peer = pytest.importorskip("fira", reason="fira is a development extra")
    group = {"rank": 6, "alpha": alpha}
    how = {"lr": LR, "weight_decay": DECAY, "correct_bias": correct_bias}
    theirs, projections = run_theirs(peer.FiraAdamW, group, no_deprecation_warning=True, **how)
    bias = "step" if correct_bias else "off"
    method = build_method(
        "fira", {"rank": 6, "gap": GAP, "alpha": alpha, "bias": bias, "staggered": False}
    )
    assert_same_movement(run_ours(with_bases(method, projections)), theirs)


@pytest.mark.parametrize(("per", "rank", "scale"), [("channel", 6, 0.25), ("tensor", 1, 128.0)])
@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("limited", [True, False])
def test_apollo_moves_as_the_package_does(
    per: str, rank: int, scale: float, scale_front: bool, limited: bool
) -> None:
    peer = pytest.importorskip("apollo_torch", reason="apollo-torch is a development extra")
    group = {"rank": rank, "proj": "random", "scale_type": per, "scale": scale}
    how = {"lr": LR, "weight_decay": DECAY, "scale_front": scale_front, "disable_nl": not limited}
    theirs, projections = run_theirs(peer.APOLLOAdamW, group, **how)
    options = {"rank": rank, "gap": GAP, "per": per, "scale": scale, "scale_front": scale_front}
    method = build_method(
        "apollo", options | {"gamma": 1.01 if limited else NO_LIMIT, "staggered": False}
    )
    assert isinstance(method.matrix, Projected)
    methods = dict.fromkeys(SHAPES, method.other)
    for name, drawn in projections.items():
        methods[name] = replace(method.matrix, projector=Drawn(rank, drawn))
    assert_same_movement(run_ours(methods), theirs)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_apollo_with_singular_vectors_moves_as_the_package_does(per: str) -> None:
    peer = pytest.importorskip("apollo_torch", reason="apollo-torch is a development extra")
    group = {"rank": 6, "proj": "svd", "scale_type": per, "scale": 0.25}
    theirs, projections = run_theirs(peer.APOLLOAdamW, group, lr=LR, weight_decay=DECAY)
    options = {"rank": 6, "gap": GAP, "per": per, "scale": 0.25, "staggered": False}
    method = build_method("apollo", options | {"projection": "svd"})
    assert_same_movement(run_ours(with_bases(method, projections)), theirs)
