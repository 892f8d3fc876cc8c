"""Estimates of the Hessian's diagonal, against exact derivatives in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem.config.schema import ModelConfig
from lowmem.errors import ConfigError
from lowmem.kernels.drawn_targets import drawn_targets
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.model.llama import Llama
from lowmem.naming import seed_of
from lowmem.optim.curvature import (
    Curved,
    Estimate,
    _signs,
    estimate_curvature,
    weights_due,
)
from lowmem.optim.formats import State, number
from lowmem.optim.method import Curvature, Dense
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.rules import Direction, Sgd
from lowmem.optim.step import MadeAnew, gather
from tests.model.sinks import Whole

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 23,
    "max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Listener:
    """A rule that only remembers the estimates it is given."""

    heard: dict[int, list[Tensor]] = field(default_factory=dict)

    def init(self, state: State, like: Tensor, place: Place) -> None:
        state["shape"] = place.seed

    def curve(self, estimate: Estimate, state: State) -> None:
        pieces = [piece.clone() for _, piece in estimate]
        self.heard.setdefault(number(state, "shape"), []).append(torch.cat(pieces))

    def direction(self, gradient: Tensor, state: State) -> Direction:
        return Direction(lambda piece, at: piece)

    def reset(self, state: State) -> None: ...

    def rotate(self, state: State, transition: Tensor, right: bool) -> None: ...


class Softmax(nn.Module):
    """Linear logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))

    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        logits = inputs @ self.weight.t()
        return functional.cross_entropy(logits, targets, reduction="sum") / total_tokens

    def drawn_loss(self, inputs: Tensor, targets: Tensor, total_tokens: int, seed: int) -> Tensor:
        drawn = drawn_targets(inputs, self.weight.detach(), targets, seed)
        return self.loss(inputs, drawn, total_tokens)


class Network(nn.Module):
    """One layer of tanh before a softmax: a Hessian that is far from diagonal."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.outer = nn.Parameter(torch.randn(5, 6, generator=generator))

    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        return network_loss(self.inner, self.outer, inputs, targets) / total_tokens


def network_loss(inner: Tensor, outer: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = torch.tanh(inputs.to(inner.dtype) @ inner.t()) @ outer.t()
    return functional.cross_entropy(logits, targets, reduction="sum")


def optimizer_of(
    model: nn.Module, kind: Curvature, gap: int = 1, seed: int = 0, mode: Any = "unfused"
) -> tuple[Optimizer, Listener]:
    listener = Listener()
    optimizer = Optimizer(mode, seed)
    for name, weight in model.named_parameters():
        optimizer.add(name, weight, Curved(listener, curvature=kind, gap=gap), 0.0)
    optimizer.attach(model)
    return optimizer, listener


def heard(optimizer: Optimizer, listener: Listener, name: str) -> list[Tensor]:
    return listener.heard[number(optimizer.slots[name].state, "shape")]


def signs_of(name: str, weight: Tensor) -> Tensor:
    """As `curvature.py` draws them for the first update of a run with seed 0."""
    flat = _signs(weight.view(-1), slice(0, weight.numel()), seed_of(0, f"signs/{name}", 1))
    return flat.view(weight.shape).double()


def test_expected_gauss_newton_estimate_is_the_exact_diagonal() -> None:
    """Of the mean loss over all tokens of two micro-batches of unequal size."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(6, 3, generator=generator), torch.zeros(6, dtype=torch.int64)
    parts = list(zip(inputs.split([4, 2]), targets.split([4, 2]), strict=True))
    estimates = []
    for seed in range(3000):
        model = Softmax()
        optimizer, listener = optimizer_of(model, "gauss-newton", seed=seed)
        optimizer.begin(0.0, len(parts))
        estimate_curvature(model, optimizer, parts, tokens=6)
        estimates += heard(optimizer, listener, "weight")
    found = torch.stack(estimates).double()
    # J'(diag p - p p')J of logits W x: the diagonal is p_v (1 - p_v) x_h^2, averaged over tokens.
    p = (inputs.double() @ model.weight.detach().double().t()).softmax(1)
    exact = ((p * (1 - p)).t() @ inputs.double().square() / 6).flatten()
    sigma = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * sigma).all()
    assert (sigma < 0.06 * exact).all()  # so that a factor of B or of the split would show


def test_hutchinson_estimate_is_the_exact_product() -> None:
    model = Network()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 4, generator=generator)
    targets = torch.randint(0, 5, (20,), generator=generator)
    optimizer, listener = optimizer_of(model, "hutchinson")
    optimizer.begin(0.0, 1)
    estimate_curvature(model, optimizer, [(inputs, targets)], tokens=20)

    weights = tuple(weight.detach().double() for weight in model.parameters())
    signs = tuple(signs_of(name, weight.detach()) for name, weight in model.named_parameters())

    def gradient(*at: Tensor) -> tuple[Tensor, ...]:
        slow = torch.func.grad(lambda w: network_loss(w[0], w[1], inputs, targets) / 20)
        return tuple(slow(at))

    products = torch.func.jvp(gradient, weights, signs)[1]
    for (name, _), sign, product in zip(model.named_parameters(), signs, products, strict=True):
        exact = (sign * product).flatten()
        (found,) = heard(optimizer, listener, name)
        # Two float32 gradients over a distance of 1e-3: 1e-7 / 1e-3 of their size.
        torch.testing.assert_close(found.double(), exact, atol=3e-4 * exact.abs().max(), rtol=0)


def test_expected_hutchinson_estimate_is_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 4, generator=generator)
    targets = torch.randint(0, 5, (20,), generator=generator)
    estimates = []
    for seed in range(400):
        model = Network()
        optimizer, listener = optimizer_of(model, "hutchinson", seed=seed)
        optimizer.begin(0.0, 1)
        estimate_curvature(model, optimizer, [(inputs, targets)], tokens=20)
        estimates += heard(optimizer, listener, "inner")
    found = torch.stack(estimates).double()
    outer = model.outer.detach().double()
    hessian = torch.func.hessian(lambda w: network_loss(w, outer, inputs, targets) / 20)(
        model.inner.detach().double()
    )
    exact = hessian.reshape(24, 24).diagonal()
    sigma = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * sigma + 1e-4).all()
    assert sigma.mean() < 0.1 * exact.abs().mean()


def test_hutchinson_estimate_of_the_model_is_that_of_a_double_backward() -> None:
    """Transformers' model in float64 with the same weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **TINY, initializer_range=0.1, pad_token_id=None, attn_implementation="eager"
    )
    theirs = transformers.LlamaForCausalLM(config)
    ours = Llama(ModelConfig.model_validate(TINY), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            ours.get_parameter(name).copy_(weight)
    theirs.double()
    text = torch.randint(0, 23, (4, 13))
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    named = dict(theirs.named_parameters())
    loss = functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    signs = [signs_of(name, ours.get_parameter(name).detach()) for name in named]
    products = torch.autograd.grad(gradients, list(named.values()), signs)

    optimizer, listener = optimizer_of(ours, "hutchinson")
    optimizer.begin(0.0, 2)
    parts = list(zip(inputs.split(3), targets.split(3), strict=True))
    estimate_curvature(ours, optimizer, parts, tokens=48)
    for name, sign, product in zip(named, signs, products, strict=True):
        exact = (sign * product).flatten()
        (found,) = heard(optimizer, listener, name)
        # The distance of 1e-3 is where truncation and rounding are both about 1e-4.
        assert (found - exact).norm() < 1e-3 * exact.norm(), name


def test_the_model_draws_its_own_targets() -> None:
    model = Llama(ModelConfig.model_validate(TINY), dtype=torch.float32, device="cpu")
    model.initialise(0)
    inputs = torch.arange(20).view(2, 10)
    targets = inputs + 1
    targets[0, :3] = -100
    made: list[dict[str, Tensor]] = [{}, {}]
    model.sink = Whole(model, made[0].__setitem__)
    drawn_loss = model.drawn_loss(inputs, targets, 17, seed=9)
    drawn_loss.backward()
    with torch.no_grad():
        x = model._final(inputs)
    drawn = drawn_targets(
        x, model.get_parameter("lm_head.weight").detach(), targets.flatten(), 9
    ).view(2, 10)
    assert not torch.equal(drawn, targets)
    model.sink = Whole(model, made[1].__setitem__)
    loss = model.loss(inputs, drawn, 17)
    loss.backward()
    assert torch.equal(loss, drawn_loss)
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


class Broken(Network):
    """Fails in its third loss."""

    losses = 0

    def loss(self, inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        self.losses += 1
        if self.losses == 3:
            raise torch.OutOfMemoryError
        return super().loss(inputs, targets, total_tokens)


@pytest.mark.parametrize("make", [Network, Broken])
def test_weights_are_restored_bit_for_bit(make: type[Network]) -> None:
    """Also when a pass fails half way."""
    model = make()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer, _ = optimizer_of(model, "hutchinson")
    optimizer.begin(0.0, 2)
    parts = [(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))] * 2
    try:
        estimate_curvature(model, optimizer, parts, tokens=6)
    except torch.OutOfMemoryError:
        assert make is Broken
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize("kind", ["gauss-newton", "hutchinson"])
def test_the_update_itself_does_not_see_the_estimate(kind: Curvature) -> None:
    """Loss, norm and gradients are those of a method without curvature, bit for bit."""
    parts = [(torch.randn(4, 3), torch.arange(4)), (torch.randn(2, 3), torch.arange(2))]
    plain, curved = Softmax(), Softmax()
    expected = Optimizer("unfused", seed=0)
    expected.add("weight", plain.weight, Dense(Sgd()), 0.0)
    expected.attach(plain)
    optimizer, listener = optimizer_of(curved, kind, gap=2)
    for update in range(5):
        made = [
            gather(model, each, iter(parts), count=2, tokens=6, lr=0.1, clip=0.5)
            for model, each in ((plain, expected), (curved, optimizer))
        ]
        assert torch.equal(made[0][0], made[1][0])
        assert torch.equal(made[0][1], made[1][1])
        expected.step()
        optimizer.step()
        assert torch.equal(plain.weight, curved.weight)
        assert len(heard(optimizer, listener, "weight")) == update // 2 + 1


def test_only_weights_that_are_due_get_an_estimate() -> None:
    model = Network()
    listener = Listener()
    optimizer = Optimizer("unfused", seed=0)
    optimizer.add("inner", model.inner, Curved(listener, curvature="hutchinson"), 0.0)
    optimizer.add("outer", model.outer, Dense(Sgd()), 0.0)
    optimizer.attach(model)
    assert list(weights_due(optimizer)) == ["inner"]
    parts = [(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))]
    gather(model, optimizer, parts, count=1, tokens=3, lr=0.1, clip=None)
    assert len(listener.heard) == 1
    assert all(slot.kept is not None for slot in optimizer.slots.values())
    optimizer.step()
    assert list(weights_due(optimizer)) == []  # every tenth update


def test_an_estimate_that_is_not_finite_says_nothing() -> None:
    model = Network()
    model.inner.data[0, 0] = float("nan")
    optimizer, listener = optimizer_of(model, "hutchinson")
    optimizer.begin(0.0, 1)
    estimate_curvature(model, optimizer, [(torch.randn(3, 4), torch.zeros(3).long())], tokens=3)
    assert all(piece.isfinite().all() for found in listener.heard.values() for piece in found)


def test_micro_batches_made_anew_exist_one_at_a_time() -> None:
    made: list[str] = []

    def make() -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(2):
            made.append(f"batch {index}")
            yield torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)

    model = Network()
    optimizer, _ = optimizer_of(model, "hutchinson")
    plain = model.loss

    def loss(inputs: Tensor, targets: Tensor, total_tokens: int) -> Tensor:
        made.append("loss")
        return plain(inputs, targets, total_tokens)

    model.loss = loss  # type: ignore[method-assign]
    gather(model, optimizer, MadeAnew(make), count=2, tokens=6, lr=0.1, clip=None)
    assert made == ["batch 0", "loss", "batch 1", "loss"] * 3  # two sides, and the update


def test_weights_that_cannot_be_moved_are_told() -> None:
    parts = [(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))]
    model = Network().bfloat16()
    optimizer, _ = optimizer_of(model, "hutchinson")
    optimizer.begin(0.0, 1)
    with pytest.raises(ConfigError, match=r"inner is stored as torch\.bfloat16"):
        estimate_curvature(model, optimizer, parts, tokens=3)
    grouped = Optimizer("unfused", seed=0)
    method = Curved(Listener(), curvature="hutchinson")
    grouped.add("inner", GroupedWeight.of(torch.randn(6, 4)), method, 0.0)
    grouped.begin(0.0, 1)
    with pytest.raises(ConfigError, match="inner is stored as 8-bit codes"):
        estimate_curvature(Network(), grouped, parts, tokens=3)


@pytest.mark.parametrize("mode", ["fused", "fused+subspace"])
def test_modes_that_do_not_hold_gradients_are_refused(mode: str) -> None:
    optimizer, _ = optimizer_of(Softmax(), "gauss-newton", mode=mode)
    parts = [(torch.randn(3, 3), torch.zeros(3, dtype=torch.int64))]
    with pytest.raises(ValueError, match="curvature needs whole gradients"):
        gather(Softmax(), optimizer, parts, count=1, tokens=3, lr=0.1, clip=None)


def test_a_model_that_draws_no_targets_is_refused() -> None:
    model = Network()
    optimizer, _ = optimizer_of(model, "gauss-newton")
    with pytest.raises(TypeError, match="Network has no drawn_loss"):
        gather(model, optimizer, [], count=1, tokens=3, lr=0.1, clip=None)
