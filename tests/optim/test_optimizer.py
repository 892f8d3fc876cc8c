"""The one path of a gradient: hooks, accumulation, norms and clipping.

The methods here are the simplest that show what the optimizer itself does: `Descent` steps along
the gradient, `FirstRows` keeps its first rows only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.model.llama import Llama
from lowmem.optim.formats import State
from lowmem.optim.method import Method, Needs
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.weights import Step

MODES = ["unfused", "fused+subspace", "fused"]
every_mode = pytest.mark.parametrize("mode", MODES)
holding_mode = pytest.mark.parametrize("mode", ["unfused", "fused+subspace"])


@dataclass(frozen=True)
class Descent:
    """The direction is the gradient; notes what it was shown."""

    seen: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=True, decay_first=True)

    def init(self, weight: Tensor, place: Place) -> State:
        return {"step": 0}

    def refresh(self, grad: Tensor, state: State) -> None:
        self.seen.append(grad.clone())

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Step:
        self.kept.append(kept.clone())

        def step(rows: Tensor, start: int, stop: int, alpha: float) -> None:
            rows.add_(kept[start:stop], alpha=alpha)

        return step


@dataclass(frozen=True)
class FirstRows(Descent):
    """A subspace of the simplest kind: the first two rows of a gradient, and zeros for the rest."""

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=False, decay_first=True)

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad[:2].clone()

    def update(self, kept: Tensor, state: State) -> Step:
        return super().update(torch.cat([kept, torch.zeros(4, 3)]), state)


class Twice(nn.Module):
    """A plain module with a norm, biases and a matrix that is used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.shared(torch.tanh(self.shared(x)))))


def module() -> Twice:
    torch.manual_seed(3)
    return Twice()


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 6, generator=generator) for _ in range(count)]


def optimizer_of(model: nn.Module, mode: Any) -> Optimizer:
    optimizer = Optimizer(mode, seed=1)
    for name, parameter in model.named_parameters():
        method = "galore" if parameter.ndim == 2 else "adamw"
        options = {"rank": 2, "gap": 2} if parameter.ndim == 2 else {}
        optimizer.add(name, parameter, build_method(method, options).matrix, 0.1)
    return optimizer


def one_weight(mode: Any, method: Method, shape: tuple[int, ...] = (6, 3)) -> Optimizer:
    """An optimizer of a single weight `w`, all ones, without decay."""
    optimizer = Optimizer(mode, seed=1)
    optimizer.add("w", torch.ones(shape), method, 0.0)
    return optimizer


def gradients(count: int, shape: tuple[int, ...] = (6, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def everything(optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of all weights and state tensors."""
    weights = {name: slot.weight.clone() for name, slot in optimizer.slots.items()}
    return weights | {key: value.clone() for key, value in optimizer.state_tensors()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@every_mode
def test_hooks_of_a_plain_module_equal_handing_gradients_over(mode: str) -> None:
    hooked, plain = module(), module()
    by_hooks, by_hand = optimizer_of(hooked, mode), optimizer_of(plain, mode)
    by_hooks.attach(hooked)
    micro = 1 if mode == "fused" else 2
    for start in range(0, 6, micro):
        batches = inputs(6)[start : start + micro]
        by_hooks.begin(0.01, micro)
        by_hand.begin(0.01, micro)
        for batch in batches:
            hooked(batch).square().sum().backward()
            assert all(parameter.grad is None for parameter in hooked.parameters())
            names, parameters = zip(*plain.named_parameters(), strict=True)
            grads = torch.autograd.grad(plain(batch).square().sum(), parameters)
            for name, grad in zip(names, grads, strict=True):
                by_hand.receive(name, grad)
        by_hooks.step()
        by_hand.step()
    assert same(everything(by_hooks), everything(by_hand))
    assert not same(everything(by_hooks), everything(optimizer_of(module(), mode)))


def test_our_decoder_hands_its_gradients_over_itself(tiny_config: Callable[..., Any]) -> None:
    model = Llama(tiny_config().model, dtype=torch.float32, device="meta", attention="cpu")
    optimizer = optimizer_of(model, "unfused")
    optimizer.attach(model)
    assert model.sink is optimizer


@holding_mode
def test_weights_move_in_step_and_not_before(mode: str) -> None:
    optimizer = one_weight(mode, Descent())
    (gradient,) = gradients(1)
    optimizer.begin(0.1, 1)
    optimizer.receive("w", gradient.clone())
    assert torch.equal(optimizer.slots["w"].weight, torch.ones(6, 3))
    optimizer.step()
    # One product and one sum in float32.
    torch.testing.assert_close(optimizer.slots["w"].weight, 1 - 0.1 * gradient, atol=1e-6, rtol=0)
    optimizer.step()  # nothing is left to apply
    torch.testing.assert_close(optimizer.slots["w"].weight, 1 - 0.1 * gradient, atol=1e-6, rtol=0)


def test_a_fused_weight_moves_at_once_and_keeps_nothing() -> None:
    optimizer = one_weight("fused", Descent())
    (gradient,) = gradients(1)
    optimizer.begin(0.1, 1)
    optimizer.receive("w", gradient.clone())
    slot = optimizer.slots["w"]
    assert slot.kept is None
    torch.testing.assert_close(slot.weight, 1 - 0.1 * gradient, atol=1e-6, rtol=0)


def test_fused_updates_refuse_to_accumulate() -> None:
    optimizer = one_weight("fused", Descent())
    with pytest.raises(ValueError, match="cannot accumulate 2 micro-batches"):
        optimizer.begin(0.1, 2)


def test_a_weight_without_a_gradient_stays() -> None:
    optimizer = one_weight("unfused", Descent())
    optimizer.add("frozen", torch.ones(2), Descent(), 0.5)
    optimizer.begin(0.1, 1)
    optimizer.receive("w", gradients(1)[0])
    optimizer.step()
    assert torch.equal(optimizer.slots["frozen"].weight, torch.ones(2))


@holding_mode
def test_sums_of_micro_batches_are_float32(mode: str) -> None:
    """In bf16, 1 + 1/256 rounds back to 1: small gradients after a large one would vanish."""
    method = Descent()
    optimizer = one_weight(mode, method)
    optimizer.begin(0.1, 65)
    optimizer.receive("w", torch.ones(6, 3, dtype=torch.bfloat16))
    for _ in range(64):
        optimizer.receive("w", torch.full((6, 3), 2.0**-8, dtype=torch.bfloat16))
    optimizer.step()
    assert torch.equal(method.kept[0], torch.full((6, 3), 1.25))


@pytest.mark.parametrize(("mode", "shown"), [("unfused", [3.0]), ("fused+subspace", [1.0])])
def test_what_decides_the_subspace(mode: str, shown: list[float]) -> None:
    """Unfused the sum of the gradients; in the subspace only the first is ever there whole."""
    method = Descent()
    optimizer = one_weight(mode, method)
    optimizer.begin(0.1, 2)
    optimizer.receive("w", torch.full((6, 3), 1.0))
    optimizer.receive("w", torch.full((6, 3), 2.0))
    optimizer.step()
    assert [grad[0, 0].item() for grad in method.seen] == shown


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("max_norm", [0.5, 4.0, 1e6])
@pytest.mark.parametrize(
    ("mode", "method"),
    [("unfused", Descent), ("fused+subspace", Descent), ("fused+subspace", FirstRows)],
)
def test_clipping_equals_torch(
    mode: str, method: type[Descent], max_norm: float, micro: int
) -> None:
    """torch.nn.utils.clip_grad_norm_ over what is kept: gradients, or their projections."""
    optimizer = Optimizer(mode, seed=1)  # type: ignore[arg-type]
    theirs = []
    for name in ("a", "b"):
        optimizer.add(name, torch.ones(6, 3), method(), 0.0)
        theirs.append(nn.Parameter(torch.ones(6, 3)[: 2 if method is FirstRows else 6].clone()))
    optimizer.begin(0.1, micro)
    for place, gradient in enumerate(gradients(2 * micro)):
        optimizer.receive("ab"[place % 2], gradient.clone())
        mine = theirs[place % 2]
        piece = gradient[: len(mine)]
        mine.grad = piece.clone() if mine.grad is None else mine.grad + piece
    norm = optimizer.norm()
    optimizer.clip(norm, max_norm)
    optimizer.step()
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, atol=0, rtol=1e-6)
    torch.optim.SGD(theirs, lr=0.1).step()
    for name, weight in zip("ab", theirs, strict=True):
        moved = optimizer.slots[name].weight[: len(weight)]
        torch.testing.assert_close(moved, weight.detach(), atol=1e-6, rtol=0)  # one float32 step


def test_clipping_ends_with_its_update() -> None:
    optimizer = one_weight("unfused", Descent())
    first, second = gradients(2)
    optimizer.begin(1.0, 1)
    optimizer.receive("w", first)
    optimizer.clip(optimizer.norm(), 1e-9)
    optimizer.step()
    optimizer.begin(1.0, 1)
    optimizer.receive("w", second.clone())
    optimizer.step()
    torch.testing.assert_close(optimizer.slots["w"].weight, 1 - second, atol=1e-6, rtol=0)


def test_fused_updates_refuse_to_clip() -> None:
    optimizer = one_weight("fused", Descent())
    optimizer.begin(0.1, 1)
    optimizer.receive("w", gradients(1)[0])
    with pytest.raises(ValueError, match="fused updates cannot be clipped"):
        optimizer.clip(optimizer.norm(), 1.0)


@pytest.mark.parametrize(
    ("mode", "norm_of", "rows"),
    [
        ("unfused", "gradient", 6),
        ("fused+subspace", "projections", 2),
        ("fused", "gradient, afterwards", 6),
    ],
)
def test_the_norm_says_what_it_measures(mode: str, norm_of: str, rows: int) -> None:
    optimizer = one_weight(mode, FirstRows())
    for gradient in gradients(2):  # the second norm knows nothing of the first gradient
        optimizer.begin(0.1, 1)
        optimizer.receive("w", gradient.clone())
        expected = gradient[:rows].double().square().sum().sqrt().item()
        assert optimizer.norm().item() == pytest.approx(expected, rel=1e-6)
        optimizer.step()
    assert optimizer.norm_of == norm_of


def test_rounding_differs_between_weights_and_updates() -> None:
    """A step of 1/16 of the spacing of bf16: which elements move is drawn anew each time."""
    optimizer = Optimizer("fused", seed=1)
    for name in ("a", "b"):
        optimizer.add(name, torch.ones(64, 64, dtype=torch.bfloat16), Descent(), 0.0)
    moved: list[Tensor] = []
    for _ in range(2):
        optimizer.begin(2.0**-12, 1)
        for name, slot in optimizer.slots.items():
            slot.weight.fill_(1.0)
            optimizer.receive(name, torch.ones(64, 64))
            moved.append(slot.weight != 1)
    for place, mask in enumerate(moved):
        assert mask.any()
        assert not any(torch.equal(mask, other) for other in moved[place + 1 :])


@every_mode
def test_small_steps_of_bf16_weights_are_right_on_average(mode: Any) -> None:
    """A thirteenth of the spacing of bf16 at 1, which rounding to nearest never makes."""
    spacing, moved = 2.0**-7, []
    for seed in range(40):
        optimizer = Optimizer(mode, seed=seed)
        optimizer.add("w", torch.ones(64, 64, dtype=torch.bfloat16), Descent(), 0.0)
        for _ in range(5):
            optimizer.begin(spacing / 13, 1)
            optimizer.receive("w", -torch.ones(64, 64))  # upwards, where the spacing is that
            optimizer.step()
        moved.append(optimizer.slots["w"].weight.double().mean() - 1)
    # 819,200 steps, each a spacing with a probability of a 13th: a deviation of 0.27 spacings.
    scatter = 5 * 0.27 * spacing / (40 * 64 * 64 * 5) ** 0.5
    assert torch.stack(moved).mean().item() == pytest.approx(5 * spacing / 13, abs=6 * scatter)
