"""SOAP against its formulas in float64 and pytorch-optimizer's, and its traps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.methods.soap import Soap
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Rows and columns of different sizes, so that eigenvalues are apart."""
    generator = torch.Generator().manual_seed(10)
    sizes = torch.linspace(0.5, 2.0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return [sizes * torch.randn(shape, generator=generator) for _ in range(count)]


def start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def optimizer_of(
    weight: Tensor, role: str = "mlp.up", decay: float = 0.1, **options: Any
) -> Optimizer:
    optimizer = Optimizer("fused", seed=1)
    optimizer.add("w", weight, build_method("soap", options).of(role), decay, Place())
    return optimizer


def advance(optimizer: Optimizer, grad: Tensor) -> None:
    optimizer.begin(0.01, 1)
    optimizer.receive("w", grad.clone())


def final(weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    optimizer = optimizer_of(weight, **options)
    for grad in grads:
        advance(optimizer, grad)
    return weight


@every_shape
@pytest.mark.parametrize("normalize", [False, True])
def test_updates_follow_the_formulas(shape: tuple[int, int], normalize: bool) -> None:
    """Written as published: M rotated back and forth, V permuted, everything float64.

    The shorter side alone where sides differ: the longer one's factor is singular at first, and
    its null space arbitrary.
    """
    b1, b2, bs, eps, frequency = 0.9, 0.95, 0.8, 1e-8, 3
    both = shape[0] == shape[1]
    sides = [0, 1] if both else [0 if shape[0] < shape[1] else 1]
    L: dict[int, Tensor] = {s: torch.zeros(shape[s], shape[s]).double() for s in sides}
    Q: dict[int, Tensor] = {}
    M, V = torch.zeros(shape).double(), torch.zeros(shape).double()  # M in plain coordinates
    W, grads = start(shape).double(), gradients(shape, 11)

    def rotated(x: Tensor, back: bool = False) -> Tensor:
        for s in sides:
            q = Q[s].T if back else Q[s]
            x = q.T @ x if s == 0 else x @ q
        return x

    for k, grad in enumerate(grads):
        G = grad.double()
        if k > 0:
            M = b1 * M + (1 - b1) * G
            V = b2 * V + (1 - b2) * rotated(G) ** 2
            N = rotated(rotated(M) / (V.sqrt() + eps), back=True)
            N = N / N.square().mean().sqrt() if normalize else N
            W = W - 0.01 * math.sqrt(1 - b2**k) / (1 - b1**k) * N
            W = W - 0.01 * 0.1 * W
        for s in sides:
            L[s] = bs * L[s] + (1 - bs) * (G @ G.T if s == 0 else G.T @ G)
            if k == 0:
                Q[s] = torch.linalg.eigh(L[s]).eigenvectors.flip(1)
            elif k % frequency == 0:
                order = (Q[s].T @ L[s] @ Q[s]).diagonal().argsort(descending=True)
                V = V.index_select(s, order)
                Q[s] = torch.linalg.qr(L[s] @ Q[s][:, order]).Q
    options = {"betas": (b1, b2), "shampoo_beta": bs, "eps": eps, "frequency": frequency}
    ours = final(start(shape), grads, one_sided=not both, normalize=normalize, **options)
    torch.testing.assert_close(ours.double(), W, atol=3e-5, rtol=0)  # QR amplifies rounding


@pytest.mark.parametrize("shape", [(12, 12), (1, 1), (17,)])
def test_soap_equals_pytorch_optimizer(shape: tuple[int, ...]) -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason="a development extra")
    theirs, grads = start(shape).requires_grad_(), gradients(shape, 9)
    reference = peer.SOAP([theirs], lr=0.01, weight_decay=0.0, precondition_frequency=3)
    for grad in grads:
        theirs.grad = grad.clone()
        reference.step()
    role = "mlp.up" if len(shape) == 2 else "norm"
    ours = final(start(shape), grads, role=role, frequency=3, decay=0.0)
    torch.testing.assert_close(ours, theirs.detach(), atol=3e-5, rtol=0)


@pytest.mark.parametrize("role", ["mlp.up", "embedding", "head", "norm"])
def test_the_first_gradient_changes_nothing_not_even_by_decay(role: str) -> None:
    shape = (9,) if role == "norm" else (12, 9)
    weight, grads = start(shape), gradients(shape, 2)
    optimizer = optimizer_of(weight, role)
    advance(optimizer, grads[0])
    assert torch.equal(weight, start(shape))
    advance(optimizer, grads[1])
    # The first step that counts: Adam's, of size one in its own coordinates.
    assert (weight - start(shape)).norm() == pytest.approx(
        0.01 * math.sqrt(weight.numel()), rel=0.1
    )


@every_shape
def test_a_refresh_changes_neither_momentum_nor_step(shape: tuple[int, int]) -> None:
    """Forgetting to turn M, or to permute V, were real bugs of ports."""
    optimizer = optimizer_of(start(shape), frequency=4)
    for grad in gradients(shape, 5):
        advance(optimizer, grad)
    slot = optimizer.slots["w"]
    left, right = (tensor(slot.state, f"{side}.basis") for side in ("left", "right"))
    momentum = left @ tensor(slot.state, "exp_avg") @ right.T
    variance = tensor(slot.state, "exp_avg_sq").sum()
    bases = left.clone(), right.clone()
    slot.method.refresh(torch.zeros(shape), slot.state)  # the refresh before the sixth
    assert not torch.equal(bases[0], left)
    assert not torch.equal(bases[1], right)
    turned = left @ tensor(slot.state, "exp_avg") @ right.T
    torch.testing.assert_close(turned, momentum, atol=1e-6, rtol=0)
    torch.testing.assert_close(tensor(slot.state, "exp_avg_sq").sum(), variance)
    for basis in (left, right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), atol=1e-5, rtol=0)


def test_the_second_moment_follows_the_order_of_eigenvalues() -> None:
    method = build_method("soap", {"frequency": 1, "one_sided": True}).matrix
    weight = torch.zeros(4, 2)
    state = method.init(weight, Place())
    state["step"] = 2
    tensor(state, "right.basis").copy_(torch.eye(2))
    tensor(state, "right.factor").copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor(state, "exp_avg_sq").copy_(torch.tensor([[5.0, 7.0]]).expand(4, 2))
    tensor(state, "exp_avg").copy_(torch.tensor([[1.0, 2.0]]).expand(4, 2))
    method.refresh(weight, state)
    assert torch.equal(tensor(state, "exp_avg_sq"), torch.tensor([[7.0, 5.0]]).expand(4, 2))
    swapped = tensor(state, "right.basis")
    assert torch.equal(swapped.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    back = tensor(state, "exp_avg") @ swapped.T
    assert torch.equal(back, torch.tensor([[1.0, 2.0]]).expand(4, 2))


@pytest.mark.parametrize(
    ("role", "shape", "options", "sides"),
    [
        ("mlp.up", (30, 10), {}, {"left", "right"}),
        ("mlp.up", (30, 10), {"one_sided": True}, {"right"}),
        ("mlp.down", (10, 30), {"one_sided": True}, {"left"}),
        ("attention.q", (10, 10), {"one_sided": True}, {"right"}),
        ("mlp.up", (30, 10), {"max_dim": 20}, {"right"}),
        ("mlp.up", (30, 10), {"max_dim": 5}, set()),
        ("embedding", (30, 10), {}, {"right"}),
        ("head", (30, 10), {"rotate_embeddings": False}, set()),
        ("norm", (30,), {}, set()),
    ],
)
def test_the_sides_that_are_rotated(
    role: str, shape: tuple[int, ...], options: dict[str, Any], sides: set[str]
) -> None:
    """By role: an embedding of a small vocabulary does not get a vocabulary-sized basis."""
    state = build_method("soap", options).of(role).init(torch.zeros(shape), Place())
    assert {key.partition(".")[0] for key in state if key.endswith(".basis")} == sides
    for side in sides:
        length = shape[side == "right"]
        assert tensor(state, f"{side}.factor").shape == (length, length)


@every_shape
def test_bfloat16_weights_keep_float32_factors(shape: tuple[int, int]) -> None:
    """QR and eigensolvers do not run in bfloat16."""
    weight = start(shape).bfloat16()
    optimizer = optimizer_of(weight, frequency=2, states="bf16")
    for grad in gradients(shape, 6):
        advance(optimizer, grad.bfloat16())
    assert weight.isfinite().all()
    state = optimizer.slots["w"].state
    dtypes = {key: value.dtype for key, value in state.items() if isinstance(value, Tensor)}
    assert {dtypes[key] for key in dtypes if "." in key} == {torch.float32}
    assert dtypes["exp_avg"] == torch.bfloat16


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_short_moments_stay_near_float32(states: str) -> None:
    grads, options = gradients((24, 10), 20), {"frequency": 4, "min_8bit": 0, "eps": 1e-6}
    exact = final(start((24, 10)), grads, **options) - start((24, 10))
    rounded = final(start((24, 10)), grads, states=states, **options) - start((24, 10))
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_a_gradient_that_is_no_number_leaves_the_bases_finite() -> None:
    optimizer = optimizer_of(start((12, 9)), frequency=1)
    grads = gradients((12, 9), 4)
    advance(optimizer, grads[0] * float("nan"))
    for grad in grads:
        advance(optimizer, grad)
    method, state = optimizer.slots["w"].method, optimizer.slots["w"].state
    assert isinstance(method, Soap)
    assert all(tensor(state, f"{side}.basis").isfinite().all() for side in ("left", "right"))
