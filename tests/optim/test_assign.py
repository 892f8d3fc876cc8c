"""Who gets which method: by role, with the user's ranks, formats and exceptions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.errors import ConfigError
from lowmem.model.llama import Llama
from lowmem.optim.assign import (
    Assignment,
    assign,
    build_optimizer,
    learning_rate,
    method_options,
    takes_rank,
)
from lowmem.optim.formats import BFloat16, Blockwise8, Float32
from lowmem.optim.method import Dense, Projected
from lowmem.optim.methods import METHODS
from lowmem.optim.projectors import SVD
from lowmem.optim.random_projectors import RandomNormal
from lowmem.optim.rules import Adam

MODEL = ModelConfig.model_validate(
    {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,  # embedding and head are square, like a query matrix
        "attention_bias": True,
        "mlp_bias": True,
    }
)

HEAD_DIM = MODEL.head_dim


def config(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(settings)


def parameters() -> tuple[dict[str, Tensor], dict[str, str]]:
    model = Llama(MODEL, dtype=torch.float32, device="meta", attention="cpu")
    return dict(model.named_parameters()), model.roles()


def assigned(**settings: Any) -> dict[str, list[tuple[Assignment, Tensor]]]:
    """Assignments with their weights by the first word of the role."""
    weights, roles = parameters()
    found: dict[str, list[tuple[Assignment, Tensor]]] = {}
    for item in assign(config(**settings), weights, roles, HEAD_DIM):
        found.setdefault(item.role.partition(".")[0], []).append((item, weights[item.name]))
    return found


def rank_of(item: Assignment) -> int | float:
    assert isinstance(item.method, Projected)
    assert isinstance(item.method.projector, SVD)
    return item.method.projector.rank


def adam_of(method: object) -> Adam:
    assert isinstance(method, Dense)
    assert isinstance(method.rule, Adam)
    return method.rule


def test_matrices_of_attention_and_mlp_are_projected_and_nothing_else() -> None:
    groups = assigned(method="galore", rank=4)
    assert set(groups) == {"attention", "mlp", "embedding", "head", "norm", "bias"}
    for group, items in groups.items():
        kind = Projected if group in ("attention", "mlp") else Dense
        assert all(isinstance(item.method, kind) for item, _ in items)
    assert sum(len(items) for items in groups.values()) == len(parameters()[0])


def test_the_role_decides_not_the_name_or_the_shape() -> None:
    weights = {"q_proj.weight": torch.empty(8, 8), "vector": torch.empty(1, 8)}
    roles = {"q_proj.weight": "embedding", "vector": "mlp.down"}
    first, second = assign(config(method="galore", rank=2), weights, roles, HEAD_DIM)
    assert isinstance(first.method, Dense)
    assert isinstance(second.method, Projected)


def test_the_order_is_that_of_the_weights() -> None:
    weights, roles = parameters()
    reverse = dict(reversed(weights.items()))
    found = assign(config(method="adamw"), reverse, roles, HEAD_DIM)
    assert [item.name for item in found] == list(reverse)


def test_a_dense_method_updates_everything_alike() -> None:
    methods = [item.method for items in assigned(method="adamw").values() for item, _ in items]
    assert all(method == methods[0] for method in methods)


def test_one_rank_for_all() -> None:
    groups = assigned(method="galore", rank=5)
    assert {rank_of(item) for item, _ in groups["attention"] + groups["mlp"]} == {5}


@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.999, 0.001])
def test_a_fraction_is_of_the_shorter_side_and_at_least_one(fraction: float) -> None:
    groups = assigned(method="galore", rank=fraction)
    for item, weight in groups["attention"] + groups["mlp"]:
        assert rank_of(item) == max(1, round(fraction * min(weight.shape)))
    narrow = [rank_of(item) for item, _ in groups["attention"] if item.role == "attention.k"]
    assert narrow == [max(1, round(fraction * 16))] * 2  # 2 of 4 heads


def test_a_table_of_ranks_by_role() -> None:
    groups = assigned(method="galore", rank={"attention": 3, "mlp": 0.5})
    assert {rank_of(item) for item, _ in groups["attention"]} == {3}
    assert {rank_of(item) for item, _ in groups["mlp"]} == {16}


@pytest.mark.parametrize(("given", "missing"), [("mlp", "attention"), ("attention", "mlp")])
def test_a_table_must_name_both_roles(given: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.rank has no entry for '{missing}'") as caught:
        assigned(method="galore", rank={given: 8})
    assert caught.value.why == f"it has: {given}"
    assert f'add "{missing}"' in caught.value.fix


@pytest.mark.parametrize("method", [name for name in METHODS if not takes_rank(name)])
@pytest.mark.parametrize("rank", [8, 0.25, {"attention": 4, "mlp": 4}])
def test_a_rank_is_refused_by_dense_methods(method: str, rank: Any) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.rank = .* does not suit") as caught:
        assigned(method=method, rank=rank)
    assert f"{method!r}" in caught.value.what
    assert "these have: galore" in caught.value.why


def test_methods_with_a_rank() -> None:
    assert takes_rank("galore")
    assert not takes_rank("adamw")


def test_options_of_the_main_method() -> None:
    settings = config(method="galore", rank={"attention": 3, "mlp": 0.5}, states="8bit", gap=7)
    assert method_options(settings, "attention") == {"gap": 7, "states": "8bit", "rank": 3}
    assert method_options(settings) == {"gap": 7, "states": "8bit", "rank": 0.5}
    assert method_options(config(method="galore")) == {}


def test_the_rest_follows_the_main_methods_adam() -> None:
    """GaLore's embedding, head and norms: the same betas, eps and format without a projection."""
    groups = assigned(method="galore", rank=4, states="bf16", betas=[0.8, 0.99], eps=1e-3)
    rule = adam_of(groups["embedding"][0][0].method)
    assert rule == Adam((0.8, 0.99), 1e-3, "step", BFloat16())
    main = groups["mlp"][0][0].method
    assert isinstance(main, Projected)
    assert main.rule == rule


@pytest.mark.parametrize(
    ("rest", "formats"),
    [
        ({}, Float32()),
        ({"states": "8bit"}, Blockwise8()),
        ({"method": "adam8bit", "options": {"min_8bit": 0}}, Blockwise8(0)),
        ({"method": "adamw", "states": "bf16"}, BFloat16()),
        ({"method": "adam8bit"}, Blockwise8()),
        ({"method": "adam8bit", "options": {"floor_codes": False}}, Blockwise8(4096, False)),
    ],
)
def test_the_rest_can_be_kept_otherwise(rest: dict[str, Any], formats: object) -> None:
    groups = assigned(method="galore", rank=4, states="fp32", rest=rest)
    for group in ("embedding", "head", "norm", "bias"):
        assert {adam_of(item.method).format for item, _ in groups[group]} == {formats}
    main = groups["mlp"][0][0].method
    assert isinstance(main, Projected)
    assert isinstance(main.rule, Adam)
    assert main.rule.format == Float32()


def test_another_method_for_the_rest_takes_nothing_from_the_main_one() -> None:
    groups = assigned(method="galore", rank=4, betas=[0.5, 0.5], rest={"method": "adamw"})
    assert adam_of(groups["head"][0][0].method) == Adam()


def test_apollo_of_the_rest_has_embedding_and_head_as_its_matrices() -> None:
    groups = assigned(method="galore", rank=4, rest={"method": "apollo_mini"})
    for role in ("embedding", "head"):
        method = groups[role][0][0].method
        assert isinstance(method, Projected)
        assert method.projector == RandomNormal(1)
    assert isinstance(groups["norm"][0][0].method, Dense)


def test_the_rest_cannot_be_projected() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.rest.method = 'galore' projects") as caught:
        assigned(method="adamw", rest={"method": "galore"})
    assert "adamw, adam8bit" in caught.value.why


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "galor"}, "optimizer.method = 'galor' is unknown"),
        ({"method": "galore", "gapp": 3}, "optimizer.gapp is unknown to method 'galore'"),
        ({"method": "adamw", "gap": 3}, "optimizer.gap is unknown to method 'adamw'"),
        ({"method": "galore", "scale": -1}, "optimizer.scale = -1 does not suit method 'galore'"),
        ({"method": "adamw", "rest": {"method": "adanw"}}, "'adanw' is unknown"),
    ],
)
def test_unsuitable_options_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assigned(**settings)


@pytest.mark.parametrize("method", list(METHODS))
def test_norms_and_biases_do_not_decay(method: str) -> None:
    for group, items in assigned(method=method, weight_decay=0.3).items():
        decay = 0.0 if group in ("norm", "bias") else 0.3
        assert {item.weight_decay for item, _ in items} == {decay}


def test_the_optimizer_has_all_state_of_every_weight_where_the_weight_is() -> None:
    weights, roles = parameters()
    settings = config(method="galore", rank=4, weight_decay=0.1)
    optimizer = build_optimizer(
        settings, weights, roles, mode="fused+subspace", seed=8, head_dim=HEAD_DIM
    )
    assert (optimizer.mode, optimizer.seed) == ("fused+subspace", 8)
    assert list(optimizer.slots) == list(weights)
    assert all(value.is_meta for _, value in optimizer.state_tensors())
    for name, slot in optimizer.slots.items():
        assert slot.weight.data_ptr() == weights[name].data_ptr()
        assert slot.state.keys() >= {"exp_avg", "exp_avg_sq", "step", "seed"}
        assert slot.weight_decay == (0.0 if roles[name] in ("norm", "bias") else 0.1)


def test_the_learning_rate_is_the_users_or_that_of_the_sheet() -> None:
    assert learning_rate(config(method="galore", lr=0.0), 10**6) == 0.0
    assert learning_rate(config(method="galore", lr=0.5), 10**6) == 0.5
    sheet = METHODS["galore"]
    assert learning_rate(config(method="galore"), 10**6) == sheet.learning_rate(10**6)
