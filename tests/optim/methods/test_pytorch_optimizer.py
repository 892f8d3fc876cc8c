"""The same trajectories as pytorch-optimizer's own implementations, where it is installed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

SHAPES: dict[str, tuple[int, ...]] = {"tall": (20, 7), "wide": (7, 20), "square": (9, 9)}
VECTOR: dict[str, tuple[int, ...]] = {"vector": (13,)}
LR, UPDATES, DECAY = 0.01, 12, 0.1

# our method and options, their class and options, shapes
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "adabelief": ("adabelief", {}, "AdaBelief", {}, SHAPES | VECTOR),
    # A large eps, so that its place shows.
    "adabelief-eps": ("adabelief", {"eps": 1e-3}, "AdaBelief", {"eps": 1e-3}, SHAPES | VECTOR),
    "exadam": ("exadam", {"eps": 1e-3}, "EXAdam", {"eps": 1e-3}, SHAPES | VECTOR),
    # They correct the bias of the whole step, as the authors' code does; the paper has eps inside.
    # At the default eps the two agree to rounding.
    "diffgrad": ("diffgrad", {}, "DiffGrad", {}, SHAPES | VECTOR),
    # They have eps outside the bias correction, unlike the authors' code, and weaken the decay of
    # what is projected, which we leave out: default eps, ratio 1.
    "adamp": ("adamp", {}, "AdamP", {"wd_ratio": 1 - 1e-12}, SHAPES | VECTOR),
    "adamp-often": (
        "adamp",
        {"delta": 2.0},
        "AdamP",
        {"delta": 2.0, "wd_ratio": 1 - 1e-12},
        SHAPES,
    ),
    # Without resets: those are followed in the recorded trajectory.
    "spam": (
        "spam",
        {"threshold": 2.0, "settle": 3, "period": 0, "eps": 1e-3},
        "SPAM",
        {"threshold": 2, "grad_accu_steps": 3, "update_proj_gap": 10**6, "eps": 1e-3},
        SHAPES | VECTOR,
    ),
    # They reset the moments before the update but restart only Adam's counter, as our clean order
    # does. Their cosine of gamma and b1 is a chained one and starts one update later: not compared.
    "stable_spam": ("stable_spam", {"period": 5}, "StableSPAM", {"update_proj_gap": 5}, SHAPES),
    # Their momentum starts from 0 instead of the first gradient, and vectors have no deviation:
    # without momentum, on matrices, they follow the paper.
    "sgd_sai": (
        "sgd_sai",
        {"momentum": 0.0},
        "SGDSaI",
        {"momentum": 0.0, "weight_decay": DECAY},
        SHAPES,
    ),
}


def weights_and_gradients(shapes: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(4)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = []
    for update in range(UPDATES):
        spike = 30.0 if update == 8 else 1.0
        gradients.append(
            {n: torch.randn(s, generator=generator) * spike for n, s in shapes.items()}
        )
    return weights, gradients


def run_ours(
    name: str,
    options: dict[str, Any],
    weights: dict[str, Tensor],
    gradients: list[dict[str, Any]],
    places: dict[str, Place] | None = None,
) -> None:
    method = build_method(name, options)
    optimizer = Optimizer("unfused", seed=0)
    for key, weight in weights.items():
        own = method.other if weight.ndim == 1 else method.matrix
        optimizer.add(key, weight, own, DECAY, (places or {}).get(key, Place()))
    for batch in gradients:
        optimizer.begin(LR, 1)
        for key in weights:
            optimizer.receive(key, batch[key].clone())
        optimizer.step()


def run_theirs(
    optimizer: Any, weights: Mapping[str, Tensor], gradients: list[dict[str, Any]]
) -> None:
    for batch in gradients:
        for key, weight in weights.items():
            weight.grad = batch[key].clone()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_it_equals_pytorch_optimizer(case: str) -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason="a development extra")
    name, options, class_name, their_options, shapes = CASES[case]
    ours, gradients = weights_and_gradients(shapes)
    theirs = {key: weight.clone().requires_grad_() for key, weight in ours.items()}
    their_options = {"weight_decay": DECAY} | their_options
    reference = getattr(peer, class_name)(list(theirs.values()), lr=LR, **their_options)
    run_theirs(reference, theirs, gradients)
    run_ours(name, options, ours, gradients)
    for key, weight in ours.items():
        # 12 updates of about 0.01 in float32; misplaced eps or decay is 1e-4 and more.
        torch.testing.assert_close(weight, theirs[key].detach(), atol=3e-6, rtol=1e-6)


class Attention(nn.Module):
    """Names by which AdamMini knows query and key; 2 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(8, bias=False)


def test_adam_mini_equals_pytorch_optimizer_on_heads_and_norms() -> None:
    """Theirs is version 1.0: other matrices have a single second moment, tokens have full Adam."""
    peer = pytest.importorskip("pytorch_optimizer", reason="a development extra")
    model = Attention()
    theirs = dict(model.named_parameters())
    ours = {key: weight.detach().clone() for key, weight in theirs.items()}
    _, gradients = weights_and_gradients({key: weight.shape for key, weight in ours.items()})
    options = {"weight_decay": DECAY, "num_embeds": 8, "num_heads": 2, "betas": (0.9, 0.99)}
    reference = peer.AdamMini(model, lr=LR, **options)
    for group in reference.param_groups:
        group["weight_decay"] = DECAY  # of norms as well
    run_theirs(reference, theirs, gradients)
    roles = {
        "q_proj.weight": "attention.q",
        "k_proj.weight": "attention.k",
        "norm.weight": "norm",
    }
    places = {key: Place(role=role, head_dim=4) for key, role in roles.items()}
    run_ours("adam_mini", {"betas": (0.9, 0.99)}, ours, gradients, places)
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key].detach(), atol=3e-6, rtol=1e-6)


def test_magma_equals_pytorch_optimizer_where_every_update_survives() -> None:
    """Without decay: theirs scales it with the step, ours does not mask it."""
    peer = pytest.importorskip("pytorch_optimizer", reason="a development extra")
    ours, gradients = weights_and_gradients(SHAPES)
    theirs = {key: weight.clone().requires_grad_() for key, weight in ours.items()}
    base = torch.optim.AdamW(list(theirs.values()), lr=LR, weight_decay=0.0)
    run_theirs(peer.Magma(base, mask_prob=1.0), theirs, gradients)
    method = build_method("magma", {"survival": 1.0})
    optimizer = Optimizer("unfused", seed=0)
    for key, weight in ours.items():
        optimizer.add(key, weight, method.matrix, 0.0)
    for batch in gradients:
        optimizer.begin(LR, 1)
        for key in ours:
            optimizer.receive(key, batch[key].clone())
        optimizer.step()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key].detach(), atol=3e-6, rtol=1e-6)
