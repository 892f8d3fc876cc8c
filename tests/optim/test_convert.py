"""A state saved with other settings: what is carried over means what it meant before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import OptimizerConfig
from lowmem.errors import CheckpointError
from lowmem.kernels.blockwise import dynamic_map
from lowmem.optim.assign import build_optimizer
from lowmem.optim.convert import Change, convert, extended
from lowmem.optim.formats import State
from lowmem.optim.method import ByRole, Dense, Needs
from lowmem.optim.methods import METHODS
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place
from lowmem.optim.weights import Step

SHAPES = {"tall": (96, 64), "wide": (48, 80), "head": (100, 64), "norm": (64,)}
ROLES = {"tall": "mlp.up", "wide": "attention.query", "head": "head", "norm": "norm"}
COARSE = {"gap": 3}  # a refresh on the way


def weights(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in SHAPES.items()}


def optimizer_of(
    device: str = "cpu", dtype: torch.dtype = torch.float32, **config: Any
) -> Optimizer:
    return build_optimizer(
        OptimizerConfig.model_validate(config),
        weights(device, dtype),
        ROLES,
        mode="unfused",
        seed=7,
        head_dim=16,
    )


def train(optimizer: Optimizer, updates: int, first: int = 0) -> None:
    for update in range(first, first + updates):
        generator = torch.Generator().manual_seed(update)
        optimizer.begin(0.01, 1)
        for name, slot in optimizer.slots.items():
            grad = torch.randn(slot.weight.shape, generator=generator)
            if grad.ndim == 2:
                grad *= torch.linspace(2.0, 0.1, grad.shape[1])  # some directions matter more
            optimizer.receive(name, grad.to(slot.weight.dtype))
        optimizer.step()


def converted(
    old: dict[str, Any], new: dict[str, Any]
) -> tuple[Optimizer, Optimizer, list[Change]]:
    """(the trained one, the one that took its state over, what was said)."""
    first, second = optimizer_of(**old), optimizer_of(**new)
    train(first, 7)
    changes = convert(
        second,
        optimizer_of("meta", **old),
        [(key, value.clone()) for key, value in first.state_tensors()],
        first.state_numbers(),
        first.updates,
    )
    return first, second, changes


def moment(optimizer: Optimizer, name: str, key: str) -> Tensor:
    """By the slow way: the map of the codes, and the scale of each block of 256."""
    state = optimizer.slots[name].state
    if key in state:
        value = state[key]
        assert isinstance(value, Tensor)
        return value.double()
    codes, absmax = state[f"{key}.codes"], state[f"{key}.absmax"]
    assert isinstance(codes, Tensor)
    assert isinstance(absmax, Tensor)
    values = dynamic_map(bool(state[f"{key}.signed"]), "cpu").double()[codes.reshape(-1).long()]
    scales = absmax.double().repeat_interleave(256)[: codes.numel()]
    return (values * scales).view(codes.shape)


def basis(optimizer: Optimizer, name: str) -> Tensor:
    slot = optimizer.slots[name]
    return slot.method.projector.basis(slot.state).double()  # type: ignore[attr-defined]


def lifted(optimizer: Optimizer, name: str) -> Tensor:
    low, vectors = moment(optimizer, name, "exp_avg"), basis(optimizer, name)
    return low @ vectors.T if optimizer.slots[name].state["right"] else vectors @ low


def saved(optimizer: Optimizer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in optimizer.state_tensors()}


def hows(changes: list[Change]) -> set[str]:
    return {change.how for change in changes}


ALL: list[dict[str, Any]] = [
    *(({"method": name}) for name in METHODS if "rank" not in METHODS[name].arguments),
    *(({"method": name, "rank": 8}) for name in METHODS if "rank" in METHODS[name].arguments),
]


@pytest.mark.parametrize("config", ALL, ids=lambda config: config["method"])
def test_unchanged_settings_keep_every_bit(config: dict[str, Any]) -> None:
    first, second, changes = converted(config, config)
    assert hows(changes) == {"kept"}
    before, after = saved(first), saved(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert first.state_numbers() == second.state_numbers()
    assert second.updates == first.updates


WITH_STATES = [
    config for config in ALL if set(METHODS[config["method"]].states) >= {"fp32", "8bit"}
]


@pytest.mark.parametrize("config", WITH_STATES, ids=lambda config: config["method"])
def test_states_in_8_bits_become_floats_of_the_same_values(config: dict[str, Any]) -> None:
    first, second, changes = converted(config | {"states": "8bit"}, config | {"states": "fp32"})
    assert hows(changes) == {"kept"}
    for name, slot in second.slots.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in slot.state:
                expected = moment(first, name, key)
                assert torch.allclose(moment(second, name, key), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("states", ["8bit", "bf16"])
@pytest.mark.parametrize("config", WITH_STATES, ids=lambda config: config["method"])
def test_narrower_states_are_nearest_and_come_back_the_same(
    config: dict[str, Any], states: str
) -> None:
    if states not in METHODS[config["method"]].states:
        pytest.skip("the method has no such states")
    narrow, wide = config | {"states": states}, config | {"states": "fp32"}
    first, second, changes = converted(wide, narrow)
    assert "anew" not in hows(changes)
    bound = {"8bit": 0.06, "bf16": 2**-8}[states]  # relative to the norm; a bf16 step is 2^-8
    assert all(change.error < bound for change in changes)
    third = optimizer_of(**wide)
    tensors = list(second.state_tensors())
    meta = optimizer_of("meta", **narrow)
    assert hows(convert(third, meta, tensors, second.state_numbers(), 7)) == {"kept"}
    for name in first.slots:
        for key in ("exp_avg", "exp_avg_sq"):
            if key in third.slots[name].state:
                assert torch.allclose(
                    moment(third, name, key), moment(second, name, key), rtol=1e-6, atol=0.0
                )
                gap = moment(second, name, key) - moment(first, name, key)
                assert gap.norm() <= bound * moment(first, name, key).norm()


SUBSPACES = [
    {"method": "galore", "solver": "svd", **COARSE},
    {"method": "galore", "solver": "iteration", "side": "reverse_std", **COARSE},
    {"method": "fira", **COARSE},
    {"method": "apollo", "projection": "svd", **COARSE},
]
every_subspace = pytest.mark.parametrize(
    "config", SUBSPACES, ids=[f"{c['method']}-{c.get('solver', '')}" for c in SUBSPACES]
)


def matrices(optimizer: Optimizer) -> list[str]:
    return [name for name in optimizer.slots if name in ("tall", "wide")]


@every_subspace
def test_a_smaller_rank_is_the_projection_of_the_lifted_moment(config: dict[str, Any]) -> None:
    first, second, changes = converted(config | {"rank": 16}, config | {"rank": 6})
    assert "cut" in hows(changes)
    off = of = 0.0
    for name in matrices(second):
        before, after, vectors = lifted(first, name), lifted(second, name), basis(second, name)
        right = second.slots[name].state["right"]
        projected = before @ vectors @ vectors.T if right else vectors @ vectors.T @ before
        assert vectors.shape[1] == 6
        # float32 bases are orthonormal to about 1e-6
        assert torch.allclose(after, projected, rtol=0.0, atol=1e-5 * before.norm().item())
        energies = moment(first, name, "exp_avg_sq").sum(dim=0 if right else 1)
        kept = moment(second, name, "exp_avg_sq").sum().item()
        assert kept == pytest.approx(energies.sort().values[-6:].sum().item(), rel=1e-5)
        off += (after - before).square().sum().item()
        of += before.square().sum().item()
    said = next(change for change in changes if change.how == "cut")
    assert said.error == pytest.approx((off / of) ** 0.5, rel=1e-3)


@every_subspace
def test_a_larger_rank_leaves_the_lifted_moment_as_it_was(config: dict[str, Any]) -> None:
    first, second, changes = converted(config | {"rank": 6}, config | {"rank": 16})
    assert "extended" in hows(changes)
    for name in matrices(second):
        before, vectors = lifted(first, name), basis(second, name)
        assert torch.allclose(lifted(second, name), before, atol=1e-6 * before.norm().item())
        assert torch.allclose(vectors.T @ vectors, torch.eye(16).double(), atol=1e-5)
        axis = int(bool(second.slots[name].state["right"]))
        second_moment = moment(first, name, "exp_avg_sq")
        weakest = second_moment.sum(dim=1 - axis).argmin()
        expected = second_moment.select(axis, int(weakest)).unsqueeze(axis)
        young = moment(second, name, "exp_avg_sq").narrow(axis, 6, 10)
        assert torch.equal(young, expected.expand_as(young))


@every_subspace
def test_up_and_down_again_is_exact(config: dict[str, Any]) -> None:
    small, large = config | {"rank": 6}, config | {"rank": 16}
    first, second, _ = converted(small, large)
    third = optimizer_of(**small)
    tensors = list(second.state_tensors())
    changes = convert(third, optimizer_of("meta", **large), tensors, second.state_numbers(), 7)
    before, after = saved(first), saved(third)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert first.state_numbers() == third.state_numbers()
    assert all(change.error == 0.0 for change in changes)


@every_subspace
def test_a_rank_at_its_limit_is_no_change(config: dict[str, Any]) -> None:
    _, _, changes = converted(config | {"rank": 80}, config | {"rank": 500})
    assert hows(changes) == {"kept"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [{"states": "8bit"}, {"rank": 6}, {"rank": 20}, {}], ids=str)
@pytest.mark.parametrize("method", ["galore", "fira", "q_galore", "apollo", "adamw"])
def test_a_converted_state_goes_on_with_weights_of_another_dtype(
    method: str, new: dict[str, Any], dtype: torch.dtype
) -> None:
    if method == "adamw" and "rank" in new:
        new = {"states": "bf16"}
    old: dict[str, Any] = {"method": method} | ({} if method == "adamw" else {"rank": 12})
    first, second = optimizer_of(**old), optimizer_of(dtype=dtype, **old | new)
    train(first, 7)
    meta = optimizer_of("meta", **old)
    convert(second, meta, first.state_tensors(), first.state_numbers(), first.updates)
    expected = {
        key: (v.shape, v.dtype) for key, v in optimizer_of(dtype=dtype, **old | new).state_tensors()
    }
    train(second, 4, first=7)
    assert {key: (v.shape, v.dtype) for key, v in second.state_tensors()} == expected
    for slot in second.slots.values():
        weight = slot.weight
        assert isinstance(weight, Tensor)
        assert weight.isfinite().all()
        # Four updates of at most about 3 learning rates of 0.01 each, times APOLLO's channels.
        assert weight.abs().max() < 1.0


NATURAL = {"method": "natural_galore"}
CROSSED: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    ({"method": "adamw"}, {"method": "adam8bit"}, {"kept", "rounded"}),  # norms stay float32
    ({"method": "adam8bit"}, {"method": "adamw"}, {"kept"}),
    ({"method": "galore", "rank": 8}, {"method": "fira", "rank": 8}, {"kept"}),
    ({"method": "fira", "rank": 8}, {"method": "galore", "rank": 4}, {"kept", "cut"}),
    ({"method": "galore", "rank": 8}, {"method": "q_galore", "rank": 8}, {"kept", "rounded"}),
    ({"method": "galore", "rank": 8}, {"method": "adamw"}, {"kept", "anew"}),
    ({"method": "adamw"}, {"method": "galore", "rank": 8}, {"kept", "anew"}),
    ({"method": "apollo", "rank": 8}, {"method": "apollo", "rank": 4}, {"kept", "anew"}),
    (
        {"method": "natural_galore", "rank": 8},
        {"method": "natural_galore", "rank": 4},
        {"kept", "anew"},
    ),
    ({"method": "adamw"}, {"method": "lion"}, {"anew"}),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), CROSSED, ids=lambda value: " ".join(sorted(map(str, value)))
)
def test_another_method_takes_over_what_means_the_same(
    old: dict[str, Any], new: dict[str, Any], expected: set[str]
) -> None:
    _, second, changes = converted(old, new)
    assert hows(changes) == expected
    assert sum(change.weights for change in changes) == len(SHAPES)
    fresh = optimizer_of(**new)
    begun_anew = next((change.weights for change in changes if change.how == "anew"), 0)
    untouched = [
        name
        for name, slot in second.slots.items()
        if all(
            torch.equal(value, fresh.slots[name].state[key])  # type: ignore[arg-type]
            for key, value in slot.state.items()
            if isinstance(value, Tensor)
        )
        and slot.state["step"] == 0
    ]
    assert len(untouched) == begun_anew


def test_nothing_is_needed_but_shapes_to_say_what_will_happen() -> None:
    old: dict[str, Any] = {"method": "galore", "rank": 8}
    new: dict[str, Any] = {"method": "galore", "rank": 4, "states": "8bit"}
    first, _, changes = converted(old, new)
    shapes = [(key, value.to("meta")) for key, value in first.state_tensors()]
    written, planned = optimizer_of("meta", **old), optimizer_of("meta", **new)
    said = convert(planned, written, shapes, first.state_numbers(), 7)
    assert [(c.how, c.weights, c.elements) for c in said] == [
        (c.how, c.weights, c.elements) for c in changes
    ]


def test_new_basis_vectors_do_not_depend_on_the_global_generator() -> None:
    vectors = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(1))).Q
    torch.manual_seed(1)
    first = extended(vectors, 9, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, extended(vectors, 9, seed=5))
    assert torch.equal(first[:, :4], vectors)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda tensors, numbers: tensors.pop("tall/basis"), "lacks optimizer state tall/basis"),
        (lambda tensors, numbers: tensors.update({"tall/x": torch.zeros(1)}), "tall/x does not"),
        (
            lambda tensors, numbers: tensors.update({"tall/basis": torch.zeros(1)}),
            "tall/basis does",
        ),
        (lambda tensors, numbers: numbers.pop("norm"), "counters of norm"),
        (lambda tensors, numbers: numbers.update(other={}), "counters of other"),
        (lambda tensors, numbers: numbers["wide"].pop("step"), "counters of wide"),
    ],
)
def test_a_state_that_is_not_of_its_settings_is_refused(spoil: Any, word: str) -> None:
    old: dict[str, Any] = {"method": "galore", "rank": 8}
    first = optimizer_of(**old)
    train(first, 2)
    tensors, numbers = saved(first), first.state_numbers()
    spoil(tensors, numbers)
    with pytest.raises(CheckpointError, match=word):
        convert(optimizer_of(**old), optimizer_of("meta", **old), tensors.items(), numbers, 2)


class Foreign:
    """What a package might bring: no part of ours. factor: its only setting."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @property
    def needs(self) -> Needs:
        return Needs(full_gradient=True, decay_first=True)

    def init(self, weight: Tensor, place: Place) -> State:
        return {"step": 0, "velocity": torch.zeros_like(weight)}

    def refresh(self, grad: Tensor, state: State) -> None:
        """No subspace."""

    def compress(self, grad: Tensor, state: State) -> Tensor:
        return grad

    def update(self, kept: Tensor, state: State) -> Step | None:
        return None


def test_a_foreign_method_that_says_nothing_of_its_states_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*, factor: float = 0.1) -> ByRole:
        adam = METHODS["adamw"].build().other
        assert isinstance(adam, Dense)
        return ByRole(Foreign(factor), adam)

    monkeypatch.setitem(METHODS, "foreign", MethodSpec(build, {"any": {"lr": 0.1}}, "this test"))
    with pytest.raises(CheckpointError, match="tall cannot be converted: Foreign of"):
        converted({"method": "foreign"}, {"method": "foreign", "factor": 0.2})
    with pytest.raises(CheckpointError, match="tall cannot be converted"):
        converted({"method": "foreign"}, {"method": "adamw"})
