"""COSMOS against its formulas in float64, and its traps one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import full  # type: ignore[import-not-found]  # on pytest's path
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.optim.formats import State, tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (14, 14)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
FORMS = ["nesterov", "average"]
RANK = 4


def matrix_method(**options: Any) -> Method:
    settings: dict[str, Any] = {"rank": RANK, "newton_schulz": "fp32", "solver": "eigh"}
    return build_method("cosmos", settings | options).matrix


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Columns of different sizes, so that eigenvalues are apart."""
    generator = torch.Generator().manual_seed(12)
    sizes = torch.linspace(0.3, 2.0, shape[-1])
    return [sizes * torch.randn(shape, generator=generator) for _ in range(count)]


def steps(method: Method, grads: list[Tensor], place: Place = Place()) -> list[Tensor]:  # noqa: B008
    """The direction of each update."""
    state = method.init(grads[0], place)
    return [full(method.update(grad.clone(), state), tuple(grad.shape)).clone() for grad in grads]


def orthogonalised(x: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / (values.norm() + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def slow_steps(grads: list[Tensor], form: str, b1: float, b2: float, gamma: float) -> list[Tensor]:
    """The formulas of the paper (average) and of the released code (nesterov), float64."""
    m, n = grads[0].shape
    scale, eps = (m * n) ** 0.5, 1e-8
    M, V = torch.zeros(m, n).double(), torch.zeros(m, RANK).double()
    P = S = torch.empty(0)
    found = []
    for k, grad in enumerate(grads, start=1):
        G = grad.double()
        if k == 1:
            P = torch.linalg.svd(G).Vh[:RANK].T
            S = (1 - b2) * (G @ P).T @ (G @ P)
        else:
            Y = b2 * P @ S + (1 - b2) * G.T @ (G @ P)
            new = torch.linalg.qr(Y).Q
            J = P.T @ new
            S, P = b2 * J.T @ S @ J + (1 - b2) * (G @ new).T @ (G @ new), new
        V = b2 * V + (1 - b2) * (G @ P) ** 2  # of the raw gradient, never rotated
        if form == "nesterov":
            M = b1 * M + G
            H = (G + b1 * M) / (1 + b1 * (1 - b1**k) / (1 - b1))
        else:
            M = b1 * M + (1 - b1) * G
            H = M / (1 - b1**k)
        A = ((H @ P) / (V.sqrt() / (1 - b2**k) ** 0.5 + eps)) @ P.T
        B = orthogonalised(H - H @ P @ P.T)
        D = A + gamma * scale * B / (B.norm() + eps)
        found.append(0.2 * scale * D / (D.norm() + eps))
    return found


@every_shape
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.8, 0.97)])
def test_updates_follow_the_formulas(
    shape: tuple[int, int], form: str, betas: tuple[float, float]
) -> None:
    """Traps 4, 5 and 14: the average form has a momentum, P and S are carried, V not rotated."""
    grads = gradients(shape, 10)
    ours = steps(matrix_method(momentum_form=form, betas=betas, gamma=0.4), grads)
    for found, expected in zip(ours, slow_steps(grads, form, *betas, 0.4), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)  # RMS is 0.2


@every_shape
@pytest.mark.parametrize("form", FORMS)
def test_the_left_side_is_the_right_side_of_the_transpose(
    shape: tuple[int, int], form: str
) -> None:
    """Trap 8: the short side may be chosen."""
    grads = gradients(shape, 6)
    left = steps(matrix_method(side="left", momentum_form=form), grads)
    right = steps(
        matrix_method(side="right", momentum_form=form), [grad.T.contiguous() for grad in grads]
    )
    for ours, other in zip(left, right, strict=True):
        torch.testing.assert_close(ours, other.T, atol=5e-5, rtol=0)


def test_the_short_side_takes_less_memory_for_wide_matrices() -> None:
    weight = torch.empty(64, 256, device="meta")

    def thin(side: str) -> int:
        state = matrix_method(side=side).init(weight, Place())
        return sum(tensor(state, key).numel() for key in ("basis", "gram", "exp_avg_sq"))

    assert thin("right") == 256 * RANK + RANK * RANK + 64 * RANK
    assert thin("std") == 64 * RANK + RANK * RANK + 256 * RANK
    assert matrix_method(side="std").init(weight, Place())["right"] == 0


class Largest(TorchDispatchMode):
    """The most elements that any result has had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])
def test_no_square_of_the_long_side_is_ever_made(solver: str) -> None:
    """Traps 1 and 2: neither kept behind a view nor computed in the first update."""
    shape = (8, 2000)
    method = matrix_method(solver=solver)
    with Largest() as largest:
        state = method.init(torch.zeros(shape), Place())
        for grad in gradients(shape, 2):
            method.update(grad, state)
    assert largest.elements < 2000 * 2000 / 20
    basis = tensor(state, "basis")
    assert basis.untyped_storage().nbytes() == 2000 * RANK * 4


@every_shape
def test_the_first_basis_is_the_leading_singular_vectors(shape: tuple[int, int]) -> None:
    """Trap 2: whichever solver; iteration finds vectors that hold nearly as much."""
    grad = gradients(shape, 1)[0]
    most = torch.linalg.svdvals(grad)[:RANK].norm()
    for solver, least in (("eigh", 1 - 1e-5), ("svd", 1 - 1e-5), ("iteration", 0.95)):
        method = matrix_method(solver=solver)
        state = method.init(grad, Place())
        method.update(grad.clone(), state)
        assert (grad @ tensor(state, "basis")).norm() > least * most


def test_the_rest_is_adamw_with_its_own_first_beta() -> None:
    """Trap 3: the released code has 0.9 there whatever b1 is."""
    weight = torch.randn(30, generator=torch.Generator().manual_seed(1))
    theirs = weight.clone().requires_grad_()
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.95, 0.96), weight_decay=0.1)
    optimizer = Optimizer("fused", seed=0)
    method = build_method("cosmos", {"betas": (0.95, 0.96)})
    optimizer.add("w", weight, method.of("norm"), 0.1)
    for grad in gradients((30,), 20):
        theirs.grad = grad.clone()
        reference.step()
        optimizer.begin(0.01, 1)
        optimizer.receive("w", grad.clone())
    torch.testing.assert_close(weight, theirs.detach(), atol=1e-6, rtol=0)


def test_roles_decide_not_rows() -> None:
    """Trap 6: 11008 rows of an MLP stay with COSMOS, a small vocabulary with AdamW."""
    method = build_method("cosmos", {})
    tall = torch.empty(11008, 4096, device="meta")
    assert "basis" in method.of("mlp.gate").init(tall, Place())
    for role in ("embedding", "head", "norm"):
        assert "basis" not in method.of(role).init(torch.empty(500, 300), Place())


@pytest.mark.parametrize("shape", [(3, 2), (4, 9), (9, 4), (1, 16), (16, 1)])
def test_a_rank_that_reaches_a_side_leaves_muon_alone(shape: tuple[int, int]) -> None:
    """Trap 7: the remainder would be nothing but rounding, made large by Newton-Schulz."""
    method, grads = matrix_method(), gradients(shape, 3)
    assert {key for key in method.init(grads[0], Place()) if key != "exp_avg"} == {"step", "seed"}
    M = torch.zeros(shape).double()
    for k, (grad, found) in enumerate(zip(grads, steps(method, grads), strict=True), start=1):
        M = 0.95 * M + grad.double()
        Q = orthogonalised((grad + 0.95 * M) / k)
        expected = 0.2 * Q * (Q.numel() ** 0.5 / Q.norm())
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@every_shape
def test_a_gradient_inside_the_subspace_has_no_muon_part(shape: tuple[int, int]) -> None:
    """Its remainder is rounding noise, which must not decide a fifth of the step."""
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(shape[0], 2, generator=generator) @ torch.randn(
        2, shape[1], generator=generator
    )
    with_muon, without = (steps(matrix_method(gamma=gamma), [grad])[0] for gamma in (1.0, 0.0))
    assert torch.equal(with_muon, without)


def test_compressing_leaves_the_gradient_as_it_was() -> None:
    """Trap 9: only `update` consumes what it is given."""
    method, grad = matrix_method(), gradients((9, 7), 1)[0]
    state, before = method.init(grad, Place()), grad.clone()
    method.refresh(grad, state)
    method.compress(grad, state)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_thin_states_are_float32_in_a_bfloat16_model(states: str) -> None:
    """Trap 10: and the momentum may be short."""
    method = matrix_method(states=states, min_8bit=0)
    weight = torch.zeros(24, 10, dtype=torch.bfloat16)
    state = method.init(weight, Place())
    for grad in gradients((24, 10), 3):
        step = method.update(grad.bfloat16(), state)
    assert full(step, (24, 10)).isfinite().all()
    assert {tensor(state, key).dtype for key in ("basis", "gram", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_short_momentum_formats_stay_near_float32(states: str) -> None:
    grads = gradients((24, 10), 15)
    exact = torch.stack(steps(matrix_method(), grads))
    rounded = torch.stack(steps(matrix_method(states=states, min_8bit=0), grads))
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@every_shape
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_step_has_the_same_rms(shape: tuple[int, int], form: str, precision: str) -> None:
    """Trap 12: lr * ratio, whatever the gradients' size."""
    method = matrix_method(momentum_form=form, ratio=0.3, newton_schulz=precision)
    for size in (1e-3, 1.0, 1e3):
        for found in steps(method, [grad * size for grad in gradients(shape, 4)]):
            assert found.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)


def test_decay_follows_lr_and_not_its_ratio() -> None:
    """Trap 13: and comes first."""
    start = torch.randn(24, 10, generator=torch.Generator().manual_seed(1))
    weight, grad = start.clone(), gradients((24, 10), 1)[0]
    optimizer = Optimizer("fused", seed=0)
    optimizer.add("w", weight, matrix_method(ratio=0.2), 0.5)
    optimizer.begin(0.1, 1)
    optimizer.receive("w", grad.clone())
    expected = start * (1 - 0.1 * 0.5) - 0.1 * steps(matrix_method(ratio=0.2), [grad])[0]
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", ["iteration", "eigh", "svd"])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_no_number_leaves_basis_and_gram(solver: str, first: bool) -> None:
    method, grads = matrix_method(solver=solver), gradients((24, 10), 6)
    state = method.init(grads[0], Place())
    if not first:
        method.update(grads[0].clone(), state)
    before: State = {key: tensor(state, key).clone() for key in ("basis", "gram")}
    method.update(grads[1] * float("inf"), state)
    assert all(torch.equal(tensor(state, key), tensor(before, key)) for key in before)
    assert tensor(state, "log.kept_bases") == 1
    for grad in grads[2:]:  # and both follow the next ones
        method.update(grad.clone(), state)
    assert tensor(state, "log.kept_bases") == 1
    basis = tensor(state, "basis")
    torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=1e-5, rtol=0)


@every_shape
def test_a_zero_start_is_forgotten(shape: tuple[int, int]) -> None:
    grads = gradients(shape, 12)
    late = steps(matrix_method(), [torch.zeros(shape)] * 2 + grads)
    assert not torch.stack(late[:2]).any()
    early = torch.stack(steps(matrix_method(), grads)[-3:])
    assert torch.nn.functional.cosine_similarity(torch.stack(late[-3:]), early, dim=0).mean() > 0.8
