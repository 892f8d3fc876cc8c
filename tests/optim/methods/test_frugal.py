"""FRUGAL: every option against a transcription in float64, and the traps of the released code."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.errors import ConfigError
from lowmem.optim.formats import number, tensor
from lowmem.optim.method import Method
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from tests.optim.block_orders import walked
from tests.optim.followers.frugal import follow
from tests.optim.followers.oracle import Oracle
from tests.optim.methods.trajectory import gradients, optimizer_of, run, step

SHAPES = {"tall": [14, 6], "wide": [5, 12], "square": [8, 8], "thin": [9, 2]}
MATRICES = ("svd", "random", "randperm")
CASES: dict[str, dict[str, Any]] = {
    f"{kind}-{side}": {"projection": "svd", "proj_type": kind, "proj_side": side}
    for kind in MATRICES
    for side in ("std", "reverse_std", "left", "right", "full")
}
CASES |= {kind: {"projection": "coord", "coord_choice": kind} for kind in ("columns", "rows")}
CASES |= {
    "randk-sgd": {"projection": "coord", "coord_choice": "randk", "inactive_update_rule": "sgd"},
    "svd-sgd": CASES["svd-std"] | {"inactive_update_rule": "sgd"},
    "svd-no": CASES["svd-std"] | {"inactive_update_rule": "no"},
    "svd-keep": CASES["svd-std"] | {"reset_statistics": False},
    "svd-uncorrected": CASES["svd-std"] | {"correct_bias": False},
    "columns-lion": CASES["columns"] | {"base": "lion"},
    "rows-sgd": CASES["rows"] | {"base": "sgd", "momentum": 0.8, "dampening": 0.3},
    "columns-nesterov": CASES["columns"] | {"base": "sgd", "momentum": 0.8, "nesterov": True},
    "columns-signs": CASES["columns"] | {"base": "sgd", "momentum": 0.8, "sign_update": True},
    "columns-nothing": CASES["columns"] | {"density": 0.0},
    "rows-everything": CASES["rows"] | {"density": 1.0},
}
CASES |= {
    f"blocks-{order}": {"projection": "block", "block_order": order, "density": 0.5, "gap": 2}
    for order in ("random", "ascending", "descending", "mirror")
}
CASES |= {
    "blocks-no": CASES["blocks-ascending"] | {"inactive_update_rule": "no"},
    "blocks-sgd-lion": CASES["blocks-random"] | {"inactive_update_rule": "sgd", "base": "lion"},
    "blocks-nothing": CASES["blocks-descending"] | {"density": 0.0},
    "blocks-everything": CASES["blocks-ascending"] | {"density": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_it_follows_its_formulas(case: str) -> None:
    outcome = follow(transcribed(CASES[case]))
    assert outcome.verdict == "ok", outcome.line(0)


def transcribed(changes: dict[str, Any]) -> Oracle:
    """A trajectory in float64 by the paper's formulas, in the form of a recorded file."""
    about: dict[str, Any] = {
        "T": 9,
        "gap": 4,
        "density": 0.4,
        "base": "adamw",
        "betas": [0.9, 0.95],
        "eps": 1e-3,  # also keeps rounding noise of a projected gradient from becoming steps
        "inactive_update_rule": "sign_sgd",
        "inactive_lr_scale": 0.5,
        "proj_params_lr_scale": 0.7,
        "reset_statistics": True,
        "correct_bias": True,
        "weight_decay": 0.1,
        "regular": ["vec"],
        "lr": [0.02 - 0.001 * t for t in range(9)],
        **changes,
    }
    shapes = {"vec": [7], **SHAPES}
    names = list(SHAPES)
    about |= {"shapes": shapes, "projected": names, "block_names_in_order": names}
    about["refresh_steps"] = list(range(0, about["T"], about["gap"]))
    about["saved_after"] = list(range(1, about["T"] + 1))
    torch.manual_seed(3)
    weights = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    tensors = {f"init.{name}": weight.float() for name, weight in weights.items()}
    states: dict[str, dict[str, Any]] = {name: {"k": 0} for name in shapes}
    maps: dict[str, Any] = {}
    for t in range(about["T"]):
        grads = {name: torch.randn(shape).double() for name, shape in shapes.items()}
        tensors |= {f"grad.{t}.{name}": grad.float() for name, grad in grads.items()}
        grads = {name: tensors[f"grad.{t}.{name}"].double() for name in grads}
        if t % about["gap"] == 0:
            maps, drawn = _chosen(about, t, grads)
            tensors |= drawn
            if about["reset_statistics"] or about["projection"] == "block":
                states |= {name: {"k": 0} for name in names}
        lr, p, c = about["lr"][t], about["proj_params_lr_scale"], about["inactive_lr_scale"]
        for name, grad in grads.items():
            weight = weights[name] * (1 - lr * about["weight_decay"])
            if name == "vec":
                weight = weight + _inner(about, grad, lr, states[name])
            else:
                down, up = maps[name]
                low = down(grad)
                if low.numel():
                    weight = weight + up(_inner(about, low, lr * p, states[name]))
                rest = grad - up(low) if low.numel() else grad
                rest[rest.abs() < 1e-6] = 0  # the bases are rounded to float32
                match about["inactive_update_rule"]:
                    case "sign_sgd":
                        weight = weight - lr * p * c * rest.sign()
                    case "sgd":
                        weight = weight - lr * p * c * rest
            weights[name] = weight
            tensors[f"weight.{t + 1}.{name}"] = weight.float()
    return Oracle(Path("transcribed"), about, tensors)


def _inner(about: dict[str, Any], low: Tensor, lr: float, state: dict[str, Any]) -> Tensor:
    """The weight change U(R, lr)."""
    (b1, b2), zero = about["betas"], torch.zeros_like(low)
    state["k"] += 1
    k, first, second = state["k"], state.get("M", zero), state.get("V", zero)
    match about["base"]:
        case "adamw":
            first, second = b1 * first + (1 - b1) * low, b2 * second + (1 - b2) * low**2
            state["M"], state["V"] = first, second
            if not about["correct_bias"]:
                return -lr * first / (second.sqrt() + about["eps"])
            return -lr / (1 - b1**k) * first / (second.sqrt() / (1 - b2**k) ** 0.5 + about["eps"])
        case "lion":
            state["M"] = b2 * first + (1 - b2) * low
            return -lr * (b1 * first + (1 - b1) * low).sign()
    mu, damp = about["momentum"], about.get("dampening", 0.0)
    state["M"] = low if k == 1 else mu * first + (1 - damp) * low
    moved = low + mu * state["M"] if about.get("nesterov") else state["M"]
    return -lr * (moved.sign() if about.get("sign_update") else moved)


def _chosen(about: dict[str, Any], t: int, grads: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """name -> (down, up), and what a file would record."""
    rho, maps, drawn = about["density"], {}, {}
    if about["projection"] == "block":
        active = _active(about["block_order"], len(SHAPES), rho, t // about["gap"])
        for position, name in enumerate(SHAPES):
            down = _everything if position in active else _nothing
            maps[name] = (down, _everything)
        return maps, {f"proj.{t}.active": torch.tensor(active, dtype=torch.int64)}
    for name, (m, n) in SHAPES.items():
        key = f"proj.{t}.{name}"
        if about["projection"] == "svd":
            sides = {
                "std": ["right"] if m >= n else ["left"],
                "reverse_std": ["left"] if m >= n else ["right"],
                "full": ["left", "right"],
            }.get(about["proj_side"], [about["proj_side"]])
            left, right = torch.eye(m).double(), torch.eye(n).double()
            for side in sides:
                length = n if side == "right" else m
                rank = round(rho * (min(m, n) if len(sides) == 2 else length))
                vectors = _vectors(about["proj_type"], grads[name], side, length, rank)
                kept = vectors.T if side == "right" else vectors
                drawn[f"{key}.{side}" if len(sides) == 2 else key] = kept.float().contiguous()
                left, right = (left, kept) if side == "right" else (kept, right)
            left, right = left.float().double(), right.float().double()
            maps[name] = (partial(_between, left.T, right.T), partial(_between, left, right))
            continue
        match about["coord_choice"]:
            case "columns":
                places = torch.randperm(n)[: int(rho * n)]
                index: Any = (slice(None), places)
                drawn[key] = places
            case "rows":
                places = torch.randperm(m)[: int(rho * m)]
                index = (places, slice(None))
                drawn[key] = places
            case _:
                flat = torch.randperm(m * n)[: int(rho * m * n)]
                index = (flat // n, flat % n)
                drawn[f"{key}.rows"], drawn[f"{key}.cols"] = index

        maps[name] = (partial(_taken, index), partial(_put_back, index, (m, n)))
    return maps, drawn


def _everything(full: Tensor) -> Tensor:
    return full


def _nothing(full: Tensor) -> Tensor:
    return full[:0]


def _between(left: Tensor, right: Tensor, middle: Tensor) -> Tensor:
    return left @ middle @ right


def _taken(index: Any, full: Tensor) -> Tensor:
    return full[index]


def _put_back(index: Any, shape: tuple[int, int], low: Tensor) -> Tensor:
    full = torch.zeros(shape, dtype=torch.float64)
    full[index] = low
    return full


def _vectors(kind: str, grad: Tensor, side: str, length: int, rank: int) -> Tensor:
    """(length, r) orthonormal columns."""
    if kind == "svd":
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        return (right.T if side == "right" else left)[:, :rank]
    if kind == "random":
        return torch.linalg.qr(torch.randn(length, rank).double()).Q
    return torch.eye(length).double()[:, torch.randperm(length)[:rank]]


def _active(order: str, count: int, rho: float, turn: int) -> list[int]:
    share = round(rho * count)
    if order == "random":
        return torch.randperm(count)[:share].tolist()
    return walked(order, count, share, turn)


def test_a_wrong_factor_is_noticed() -> None:
    oracle = transcribed(CASES["svd-std"])
    oracle.about["inactive_lr_scale"] *= 1.01
    assert follow(oracle).verdict.startswith("FAIL")


def frugal(**options: Any) -> Method:
    return build_method("frugal", options).matrix


def trained(dtype: torch.dtype, shape: tuple[int, int], **options: Any) -> Tensor:
    """A weight after updates with random gradients."""
    grads = [grad.to(dtype) for grad in gradients(shape, 6)]
    return run(frugal(**{"gap": 3} | options), torch.zeros(shape, dtype=dtype), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["svd", "random"])
@pytest.mark.parametrize(
    ("shape", "side", "density"),
    [((8, 8), "std", 1.0), ((12, 5), "std", 1.0), ((8, 8), "full", 1.0), ((4, 9), "left", 0.99)],
)
def test_the_sign_of_rounding_noise_is_no_step_where_nothing_is_left_out(
    dtype: torch.dtype, projection: str, shape: tuple[int, int], side: str, density: float
) -> None:
    options = {"projection": projection, "side": side, "density": density, "solver": "eigh"}
    both = trained(dtype, shape, **options)
    only = trained(dtype, shape, **options, state_free="no")
    assert torch.equal(both, only)


@pytest.mark.parametrize(
    ("side", "density"), [("reverse_std", 0.5), ("reverse_std", 1.0), ("full", 1.0)]
)
def test_the_sign_of_rounding_noise_is_no_step_where_a_gradient_is_all_captured(
    side: str, density: float
) -> None:
    """12 x 5: 6 or 12 vectors on the longer side, of which the gradient of a refresh has 5."""
    options = {"projection": "svd", "side": side, "density": density, "solver": "eigh"}
    options |= {"gap": 1, "eps": 1e-2}
    both = trained(torch.float32, (12, 5), **options)
    assert torch.equal(both, trained(torch.float32, (12, 5), **options, state_free="no"))


def test_as_many_vectors_as_one_gradient_has_leave_something_of_the_next_out() -> None:
    options = {"projection": "svd", "side": "reverse_std", "density": 0.5, "solver": "eigh"}
    both = trained(torch.float32, (12, 5), **options)
    only = trained(torch.float32, (12, 5), **options, state_free="no")
    assert (both - only).abs().max().item() > 0.009  # a step of lr 0.01


@pytest.mark.parametrize(("side", "gap"), [("std", 3), ("full", 1)])
def test_the_sign_of_rounding_noise_is_no_step_where_gradients_share_few_directions(
    side: str, gap: int
) -> None:
    left, right = (torch.linalg.qr(gradients((length, 3), 1)[0]).Q for length in (14, 10))
    grads = [left @ middle @ right.T for middle in gradients((3, 3), 6)]
    options = {"projection": "svd", "side": side, "solver": "eigh", "density": 0.5, "eps": 1e-2}
    found = [
        run(frugal(gap=gap, state_free=rule, **options), torch.zeros(14, 10), grads)
        for rule in ("sign_sgd", "no")
    ]
    assert torch.equal(*found)


def test_the_smallest_gradients_outside_chosen_columns_still_count() -> None:
    """Entries are not rounded: no threshold, however large another gradient is."""
    grad = torch.full((4, 8), 1e-12)
    grad[0, 0] = 1e6
    weight = torch.zeros(4, 8)
    optimizer = optimizer_of(frugal(projection="columns", density=0.5), weight, decay=0.0)
    step(optimizer, grad, lr=0.25)
    chosen = tensor(optimizer.slots["weight"].state, "columns").long()
    others = [column for column in range(8) if column not in chosen]
    assert (weight[:, others] == -0.25).all()


def test_sign_steps_below_half_a_bf16_step_are_not_lost() -> None:
    """Near 0.5 neighbours in bf16 are 2e-3 apart; 20 steps of 1e-4 add up to one."""
    weight = torch.full((128, 128), 0.5, dtype=torch.bfloat16)
    optimizer = optimizer_of(frugal(density=0.0), weight, decay=0.0)
    for _ in range(20):
        step(optimizer, torch.ones(128, 128, dtype=torch.bfloat16), lr=1e-4)
    assert weight.double().mean().item() == pytest.approx(0.5 - 2e-3, rel=1e-4)


RANDOM = ("random", "randperm", "columns", "rows", "randk")


@pytest.mark.parametrize("projection", RANDOM)
def test_random_choices_follow_from_seed_and_refresh_alone(projection: str) -> None:
    def choices(seed: int, noise: int) -> list[Tensor]:
        torch.manual_seed(noise)
        optimizer = Optimizer("unfused", seed)
        method = frugal(projection=projection, gap=2, density=0.5)
        optimizer.add("weight", torch.zeros(20, 16), method, 0.0)
        found = []
        for grad in gradients((20, 16), 4, seed=noise):
            step(optimizer, grad)
            found.append(
                torch.cat(
                    [v.float().view(-1) for k, v in optimizer.state_tensors() if "exp" not in k]
                )
            )
        return found

    one, two, other = choices(1, noise=5), choices(1, noise=6), choices(2, noise=5)
    assert all(map(torch.equal, one, two))
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[2], one[3])
    assert not torch.equal(one[0], one[2])
    assert not torch.equal(one[0], other[0])


def test_weights_without_a_gradient_are_passed_over() -> None:
    """They neither fail nor hold up the others, whichever kind of subspace."""
    for projection in ("svd", "columns", "blocks"):
        optimizer = Optimizer("unfused", 0)
        weights = {name: torch.zeros(6, 5) for name in ("first", "second", "third", "fourth")}
        for index, (name, weight) in enumerate(weights.items()):
            method = frugal(projection=projection, density=0.5, gap=2, staggered=False)
            optimizer.add(name, weight, method, 0.0, Place(0, "mlp.up", index, 4))
        for update, grad in enumerate(gradients((6, 5), 6)):
            optimizer.begin(0.1, 1)
            for name in weights:
                if name != "first" or update not in (0, 2):  # both when it would be refreshed
                    optimizer.receive(name, grad.clone())
            optimizer.step()
        states = {name: slot.state for name, slot in optimizer.slots.items()}
        assert number(states["first"], "step") == 4
        assert number(states["second"], "since") == 4
        assert all(weight.isfinite().all() and (weight != 0).any() for weight in weights.values())


@pytest.mark.parametrize("projection", ["svd", "columns"])
def test_momentum_starts_from_the_gradient_and_never_from_the_weights(projection: str) -> None:
    """Two updates with the same gradient: 1 + (mu + 1) of it, wherever the weight begins."""
    grad = gradients((6, 4), 1)[0]
    options = {"base": "sgd", "momentum": 0.5, "density": 1.0, "projection": projection}
    for start in (torch.zeros(6, 4), torch.full((6, 4), 8.0)):
        moved = start - run(frugal(**options), start, [grad, grad], decay=0.0)
        torch.testing.assert_close(moved, 0.01 * 2.5 * grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"state_free": "none"}, "state_free"),
        ({"density": 1.5}, "density"),
        ({"density": -0.1}, "density"),
        ({"gap": 0}, "gap"),
        ({"projection": "coord"}, "projection"),
        ({"on_refresh": "keep"}, "on_refresh"),  # blocks have nothing to keep
    ],
)
def test_unsuitable_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        frugal(**options)


def test_spikes_and_loss_scales_do_not_change_sign_steps() -> None:
    grads = gradients((8, 6), 5)
    method = frugal(density=0.0)
    plain = run(method, torch.zeros(8, 6), grads)
    assert torch.equal(plain, run(method, torch.zeros(8, 6), [1e3 * grad for grad in grads]))
    assert plain.abs().max() <= 5 * 0.01 + 1e-6  # five updates of lr 0.01


@pytest.mark.parametrize("projection", ["blocks", "svd", *RANDOM])
def test_at_density_zero_matrices_have_no_moments(projection: str) -> None:
    optimizer = optimizer_of(frugal(projection=projection, density=0.0), torch.zeros(12, 9))
    step(optimizer, gradients((12, 9), 1)[0])
    assert not [key for key, value in optimizer.state_tensors() if value.numel()]


def test_at_density_one_blocks_are_adamw() -> None:
    start, grads = gradients((7, 9), 1, seed=1)[0], gradients((7, 9), 8)
    adamw = build_method("adamw", {}).matrix
    assert torch.equal(run(frugal(density=1.0), start, grads), run(adamw, start, grads))


def test_galore_is_frugal_that_keeps_its_moments_and_drops_the_rest() -> None:
    start, grads = gradients((12, 8), 1, seed=1)[0], gradients((12, 8), 9)
    common = {"gap": 4, "scale": 0.25, "solver": "eigh", "eps": 1e-6}
    galore = build_method("galore", common | {"rank": 2}).matrix
    kept = {"projection": "svd", "state_free": "no", "on_refresh": "keep", "bias": "step"}
    found = run(frugal(density=0.25, **kept, **common), start, grads, decay=0.0)
    torch.testing.assert_close(found, run(galore, start, grads, decay=0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("projection", "side", "expected"),
    [
        ("svd", "std", (30, 2)),  # 2.5 to even
        ("svd", "reverse_std", (8, 10)),  # 7.5 to even
        ("svd", "full", (2, 2)),
        ("randperm", "left", (8, 10)),
        ("columns", "std", (30, 2)),
        ("rows", "std", (7, 10)),  # downwards
        ("randk", "std", (75,)),
    ],
)
def test_the_share_is_rounded_as_published(
    projection: str, side: str, expected: tuple[int, ...]
) -> None:
    method = frugal(projection=projection, side=side)
    state = method.init(torch.zeros(30, 10, device="meta"), Place())
    assert tuple(tensor(state, "exp_avg").shape) == expected


def test_the_moments_start_anew_with_every_refresh() -> None:
    optimizer = optimizer_of(frugal(projection="svd", gap=3, density=0.5), torch.zeros(8, 8))
    found = []
    for grad in gradients((8, 8), 7):
        step(optimizer, grad)
        state = optimizer.slots["weight"].state
        found.append((number(state, "since"), tensor(state, "exp_avg_sq").mean().item()))
    assert [since for since, _ in found] == [0, 0, 0, 3, 3, 3, 6]
    assert all(later > one for (_, one), (_, later) in pairwise(found[:3]))
    assert found[3][1] < found[2][1]
