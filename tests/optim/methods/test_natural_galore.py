"""Natural GaLore against its formulas in float64, and its traps one by one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import State, number, tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (14, 14)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
RANK, HISTORY, GAP = 4, 3, 4


def method(**options: Any) -> Method:
    settings: dict[str, Any] = {"rank": RANK, "history": HISTORY, "gap": GAP, "solver": "svd"}
    return build_method("natural_galore", settings | options).matrix


def gradients(shape: tuple[int, int], count: int, size: float = 0.02) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator) * size for _ in range(count)]


def optimizer_of(weight: Tensor, **options: Any) -> Optimizer:
    optimizer = Optimizer("fused", seed=1)
    optimizer.add("w", weight, method(**options), 0.1, Place())
    return optimizer


def advance(optimizer: Optimizer, grad: Tensor) -> State:
    optimizer.begin(0.01, 1)
    optimizer.receive("w", grad.clone())
    return optimizer.slots["w"].state


def down(optimizer: Optimizer, grad: Tensor) -> Tensor:
    """The projected gradient."""
    slot = optimizer.slots["w"]
    return slot.method.compress(grad, slot.state)


def inverse_times(history: list[Tensor], g: Tensor, lam: float) -> Tensor:
    """(lam I + Q Q')^-1 g as a dense system, float64."""
    Q = torch.stack([h.double().reshape(-1) for h in history], dim=1)
    fisher = Q @ Q.T + lam * torch.eye(len(Q), dtype=torch.float64)
    return torch.linalg.solve(fisher, g.double().reshape(-1)).view(g.shape)


@every_shape
@pytest.mark.parametrize("two_sided", [True, False])
def test_updates_follow_the_formulas(shape: tuple[int, int], two_sided: bool) -> None:
    """Trap 1: both the released form and the paper's."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    expected = weight.double()
    optimizer = optimizer_of(weight, two_sided=two_sided, noise=0.0, lam=1e-3, eps=1e-4)
    history: list[Tensor] = []
    M = V = None
    for k, grad in enumerate(gradients(shape, 10), start=1):
        state = advance(optimizer, grad)
        one = "basis" in state
        eye = [torch.eye(side, dtype=torch.float64) for side in shape]
        if one:  # signs of singular vectors are ours
            basis, right = tensor(state, "basis").double(), bool(state["right"])
            A, B = (eye[0], basis) if right else (basis, eye[1])
        else:
            A, B = (tensor(state, f"{side}.basis").double() for side in ("left", "right"))
        R = A.T @ grad.double() @ B
        history = [*history, R][-HISTORY:]
        u = inverse_times(history, R, 1e-3)
        M = 0.1 * u if M is None else 0.9 * M + 0.1 * u
        V = 0.001 * u**2 if V is None else 0.999 * V + 0.001 * u**2
        eta = 0.01 * math.sqrt(1 - 0.999**k) / (1 - 0.9**k)
        expected = expected - eta * 0.25 * A @ (M / (V.sqrt() + 1e-4)) @ B.T
        expected = expected - 0.01 * 0.1 * expected
        assert two_sided != one
    # Rounding noise off the diagonal at a refresh is normalised to a visible step (trap 2).
    torch.testing.assert_close(weight.double(), expected, atol=2e-5, rtol=0)


@every_shape
def test_rounding_noise_at_a_refresh_moves_nothing(shape: tuple[int, int]) -> None:
    """Trap 2: on its own singular vectors a gradient is diagonal."""
    for noise, moves in ((1e-6, False), (0.0, True)):
        weight = torch.zeros(shape)
        state = advance(optimizer_of(weight, noise=noise, eps=1e-12), gradients(shape, 1)[0])
        natural = tensor(state, "exp_avg")
        beside = natural - natural.diagonal().diag()
        assert bool(beside.any()) == moves
        assert natural.diagonal().all()


@pytest.mark.parametrize("history_states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_the_history_can_be_cleared_at_a_refresh(history_states: str, two_sided: bool) -> None:
    """Trap 3: then u = g / (lam + |g|^2), and the moments stay."""
    shape = (24, 10)
    options = {"on_refresh": "clear", "history_states": history_states, "two_sided": two_sided}
    optimizer = optimizer_of(torch.zeros(shape), min_8bit=0, **options)
    *before, last = gradients(shape, GAP + 1)
    for grad in before:
        state = advance(optimizer, grad)
    old = tensor(state, "exp_avg").clone()
    advance(optimizer, last)
    assert number(state, "history_count") == 1
    g = down(optimizer, last)
    g = g * (g.abs() >= 1e-6 * g.abs().max())
    natural = (tensor(state, "exp_avg") - 0.9 * old) / 0.1
    torch.testing.assert_close(natural, g / (1e-3 + g.square().sum()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("on_refresh", ["keep", "clear", "reset", "rotate"])
def test_moments_survive_a_refresh_unless_they_are_to_be_reset(on_refresh: str) -> None:
    optimizer = optimizer_of(torch.zeros(24, 10), on_refresh=on_refresh)
    grads = gradients((24, 10), GAP + 1)
    for grad in grads[:GAP]:
        state = advance(optimizer, grad)
    optimizer.slots["w"].method.refresh(grads[GAP], state)
    assert bool(tensor(state, "exp_avg").any()) == (on_refresh != "reset")
    assert bool(tensor(state, "history").any()) == (on_refresh in ("keep", "rotate"))
    if on_refresh == "reset":
        assert state["since"] == GAP


@pytest.mark.parametrize("two_sided", [True, False])
@every_shape
def test_history_and_moments_can_be_rotated(shape: tuple[int, int], two_sided: bool) -> None:
    """Trap 3: by A_new' A_old and B_new' B_old; lengths and inner products anew."""
    optimizer = optimizer_of(torch.zeros(shape), on_refresh="rotate", two_sided=two_sided)
    grads = gradients(shape, GAP + 1)
    for grad in grads[:GAP]:
        state = advance(optimizer, grad)
    chosen = optimizer.slots["w"].method

    def bases() -> tuple[Tensor, Tensor]:
        if two_sided:
            left, right = (tensor(state, f"{side}.basis") for side in ("left", "right"))
            return left.clone(), right.clone()
        basis, eyes = tensor(state, "basis").clone(), [torch.eye(side) for side in shape]
        return (eyes[0], basis) if state["right"] else (basis, eyes[1])

    (A, B), old = bases(), tensor(state, "exp_avg").clone()
    rows, size = tensor(state, "history")[:, : old.numel()].clone(), old.numel()
    chosen.refresh(grads[GAP], state)
    A_new, B_new = bases()

    def turned(low: Tensor) -> Tensor:
        return A_new.T @ A @ low @ B.T @ B_new

    torch.testing.assert_close(tensor(state, "exp_avg"), turned(old))
    history = tensor(state, "history")[:, :size]
    for row, before in zip(history, rows, strict=True):
        torch.testing.assert_close(row.view(old.shape), turned(before.view(old.shape)))
    gram = history.double() @ history.double().T
    torch.testing.assert_close(tensor(state, "gram"), gram)


@pytest.mark.parametrize("history_states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_u_solves_the_system_however_large_the_gradient(history_states: str, size: float) -> None:
    """Trap 4: |g|^2 / lam from 1e-2 to 1e10, gradients nearly the same from update to update."""
    shape = (24, 10)
    optimizer = optimizer_of(
        torch.zeros(shape), gap=100, history_states=history_states, min_8bit=0, noise=0.0
    )
    generator = torch.Generator().manual_seed(6)
    common = torch.randn(shape, generator=generator)
    old = torch.zeros(RANK, RANK)
    for _ in range(6):
        grad = size * (common + 0.3 * torch.randn(shape, generator=generator))
        # What the format keeps of earlier gradients is the history; the newest is exact.
        state = optimizer.slots["w"].state
        rows = _rows(state)
        newest = number(state, "history_count") % HISTORY
        held = [row for i, row in enumerate(rows) if i != newest]
        advance(optimizer, grad)
        g = down(optimizer, grad)
        exact = inverse_times([*held, g.reshape(-1)], g, 1e-3)
        natural = (tensor(state, "exp_avg") - 0.9 * old) / 0.1
        old = tensor(state, "exp_avg").clone()
        error = (natural.double() - exact).norm() / exact.norm()
        assert error < 1e-4  # float32, and the moments it is read from


def _rows(state: State) -> list[Tensor]:
    chosen = method(history_states="8bit" if "history.codes" in state else "fp32", min_8bit=0)
    if "history" in state and tensor(state, "history").dtype == torch.bfloat16:
        chosen = method(history_states="bf16")
    rule = chosen.rule  # type: ignore[attr-defined]
    return [rule._row(state, row)[: RANK * RANK].clone() for row in range(HISTORY)]


def test_a_matrix_that_is_not_definite_gets_jitter_instead_of_nan() -> None:
    """Trap 4: without waiting for the device."""
    from lowmem.optim.methods.natural_galore import _inverse_column

    gram = torch.full((3, 3), 1e12, dtype=torch.float64)
    gram[0, 0] -= 1.0
    column = _inverse_column(gram, torch.tensor(1e-8, dtype=torch.float64), 2)
    assert column.isfinite().all()


def test_history_bytes_follow_its_format_and_length() -> None:
    """Trap 5: the history is the largest state; bytes per element 4, 2 and a little over 1."""
    weight = torch.empty(256, 128, device="meta")

    def history_bytes(**options: Any) -> int:
        state = method(rank=64, **options).init(weight, Place())
        return sum(v.nbytes for k, v in state.items() if "history" in k and isinstance(v, Tensor))

    elements = 64 * 64
    assert history_bytes(history=8) == 8 * elements * 4
    assert history_bytes(history=20) == 20 * elements * 4
    assert history_bytes(history=8, history_states="bf16") == 8 * elements * 2
    assert history_bytes(history=8, history_states="8bit") == 8 * elements * (1 + 4 / 256)
    assert history_bytes(history=8, two_sided=False) == 8 * 64 * 256 * 4


def test_a_relative_lam_does_not_see_the_size_of_gradients() -> None:
    """Trap 6: a power of two changes no bit; an absolute lam changes the weights."""

    def final(size: float, **options: Any) -> Tensor:
        weight = torch.zeros(24, 10)
        optimizer = optimizer_of(weight, eps=1e-30, **options)
        for grad in gradients((24, 10), 6):
            advance(optimizer, grad * size)
        return weight

    assert torch.equal(
        final(1.0, relative_lam=True, lam=0.5), final(2.0**-6, relative_lam=True, lam=0.5)
    )
    assert (final(1.0, lam=0.5) - final(2.0**6, lam=0.5)).abs().max() > 1e-3


def test_the_log_says_how_much_of_the_gradient_is_left() -> None:
    """Trap 6: lam <g, u> / |g|^2; without any earlier gradient lam / (lam + |g|^2)."""
    optimizer = optimizer_of(torch.zeros(24, 10), lam=0.01, noise=0.0)
    state = advance(optimizer, gradients((24, 10), 1)[0])
    square = tensor(state, "history").square().sum()
    torch.testing.assert_close(tensor(state, "log.damped"), 0.01 / (0.01 + square))


def test_the_history_in_8_bit_stays_near_that_in_float32() -> None:
    def final(history_states: str) -> Tensor:
        weight = torch.zeros(24, 10)
        optimizer = optimizer_of(weight, history_states=history_states, min_8bit=0, eps=1e-3)
        for grad in gradients((24, 10), 12):
            advance(optimizer, grad)
        return weight

    exact = final("fp32")
    assert (final("8bit") - exact).norm() < 0.05 * exact.norm()
    assert (final("bf16") - exact).norm() < 0.01 * exact.norm()
