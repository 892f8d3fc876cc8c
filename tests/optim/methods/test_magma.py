"""Magma over a dense method and over methods that project."""

from typing import Any

import pytest
import torch

from lowmem.errors import ConfigError
from lowmem.optim.formats import tensor
from lowmem.optim.method import Dense, Projected
from lowmem.optim.methods import METHODS, build_method
from lowmem.optim.methods.magma import Masked
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.rules import Adam
from tests.optim.methods.trajectory import LR, SHAPES, gradients, optimizer_of, step

GALORE = {"rank": 3, "gap": 4, "solver": "eigh", "scale": 1.0, "staggered": False}


def magma_and_base(base: str, options: dict[str, Any], **own: Any) -> tuple[Masked, Any]:
    """The method around that base, and the base alone."""
    built = build_method("magma", {"base": base, "base_options": options} | own).matrix
    assert isinstance(built, Masked)
    return built, build_method(base, options).matrix


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_dense_step_is_masked_and_weighed(shape: tuple[int, ...], states: str) -> None:
    """The alignment is of the moment after the update; a masked update moves the moments."""
    start, grads = gradients(shape, 1, seed=1)[0], gradients(shape, 12)
    masked, base = magma_and_base("adamw", {"states": states})
    ours, theirs = optimizer_of(masked, start.clone()), optimizer_of(base, start.clone())
    weight, s, seen = start.clone(), 1.0, set()
    for k, grad in enumerate(grads, start=1):
        before = theirs.slots["weight"].weight.clone()
        moment = _moment(theirs)
        step(ours, grad)
        step(theirs, grad)
        m = 0.9 * moment.double() + 0.1 * grad.double()
        cosine = (m * grad.double()).sum() / (m.norm() * grad.double().norm())
        s = 0.9 * s + 0.1 * torch.sigmoid(cosine / 2).item()
        slot = ours.slots["weight"]
        z = masked.survives(int(slot.state["seed"]), k)
        seen.add(z)
        # Decay is not masked. The base has the same moments but another weight.
        step_of_base = theirs.slots["weight"].weight - before * (1 - LR * 0.1)
        weight = weight * (1 - LR * 0.1) + (s * step_of_base if z else 0.0)
        torch.testing.assert_close(slot.weight, weight, atol=2e-6, rtol=0)
        assert tensor(slot.state, "log.alignment").item() == pytest.approx(s, abs=1e-5)
        assert torch.equal(_moment(ours), _moment(theirs))
    assert seen == {False, True}


def _moment(optimizer: Optimizer) -> torch.Tensor:
    slot = optimizer.slots["weight"]
    method: Any = slot.method
    form = getattr(method, "inner", method).rule.format
    at = slice(0, slot.weight.numel())
    return form.load(slot.state, "exp_avg", at).clone().view(slot.weight.shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_over_galore_the_alignment_is_of_the_subspace(shape: tuple[int, ...]) -> None:
    masked, _ = magma_and_base("galore", GALORE)
    optimizer = optimizer_of(masked, gradients(shape, 1, seed=1)[0])
    slot, s = optimizer.slots["weight"], 1.0
    for grad in gradients(shape, 9):
        step(optimizer, grad)
        low = masked.inner.compress(grad, slot.state)
        cosine = torch.cosine_similarity(tensor(slot.state, "exp_avg").view(-1), low.view(-1), 0)
        s = 0.9 * s + 0.1 * torch.sigmoid(cosine / 2).item()
        assert tensor(slot.state, "log.alignment").item() == pytest.approx(s, abs=1e-5)


def test_it_costs_one_number_whatever_the_base() -> None:
    for base, options in (("adamw", {}), ("galore", GALORE)):
        masked, plain = magma_and_base(base, options)
        sizes = [
            sum(value.nbytes for _, value in optimizer_of(m, torch.zeros(20, 30)).state_tensors())
            for m in (masked, plain)
        ]
        assert sizes[0] - sizes[1] == 4


def test_half_of_the_updates_survive_and_weights_differ_in_which() -> None:
    masked, _ = magma_and_base("adamw", {})
    draws = [[masked.survives(seed, update) for update in range(2000)] for seed in (1, 2)]
    for drawn in draws:
        assert sum(drawn) / 2000 == pytest.approx(0.5, abs=0.05)  # 4.5 standard deviations
    assert draws[0] != draws[1]


def test_embedding_head_and_norms_follow_the_base_unmasked() -> None:
    for base in ("adamw", "galore", "diffgrad"):
        method, plain = build_method("magma", {"base": base}), build_method(base, {})
        assert [method.of(role) for role in ("embedding", "head", "norm", "bias")] == [
            plain.of(role) for role in ("embedding", "head", "norm", "bias")
        ]
        assert isinstance(method.of("mlp.up"), Masked)


def test_a_base_without_a_moment_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match="sgd_sai") as refused:
        build_method("magma", {"base": "sgd_sai"})
    assert "adamw" in refused.value.fix
    assert "galore" in refused.value.fix
    assert "sgd_sai" not in refused.value.fix
    with pytest.raises(ConfigError):
        build_method("magma", {"base": "magma"})
    with pytest.raises(ConfigError, match="rnak"):
        build_method("magma", {"base": "galore", "base_options": {"rnak": 3}})


def follow_adam() -> list[str]:
    methods: dict[str, Any] = {name: build_method(name, {}).matrix for name in METHODS}
    return [
        name
        for name, method in methods.items()
        if isinstance(method, Dense | Projected) and isinstance(method.rule, Adam)
    ]


@pytest.mark.parametrize("name", follow_adam())
def test_every_method_that_follows_adam_can_be_a_base(name: str) -> None:
    """Also those that look at the whole gradient: what is compared is what their Adam is given."""
    options = {"rank": 3} if "rank" in METHODS[name].arguments else {}
    masked, _ = magma_and_base(name, options, survival=1.0)
    optimizer = optimizer_of(masked, torch.zeros(9, 6), decay=0.0)
    for grad in gradients((9, 6), 3):
        step(optimizer, grad)
    slot = optimizer.slots["weight"]
    assert slot.weight.isfinite().all()
    assert (slot.weight != 0).any()
    assert 0.3 < tensor(slot.state, "log.alignment").item() < 1.0


def test_a_gradient_that_is_not_finite_leaves_the_alignment() -> None:
    masked, _ = magma_and_base("adamw", {})
    optimizer = optimizer_of(masked, torch.zeros(4, 4))
    step(optimizer, torch.full((4, 4), float("nan")))
    assert tensor(optimizer.slots["weight"].state, "log.alignment") == 1
