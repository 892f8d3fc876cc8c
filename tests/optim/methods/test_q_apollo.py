"""Q-APOLLO: where it differs from APOLLO, and what its recorded files must catch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import follow_oracle  # type: ignore[import-not-found]  # a script, on pytest's path
import pytest
import torch

from lowmem.errors import ConfigError
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.optim.formats import tensor
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.place import Place

ORACLES = Path(__file__).parents[1] / "oracles"
NAMES = ["q_apollo", "q_apollo_mini"]
every_name = pytest.mark.parametrize("name", NAMES)


def other_noise(oracle: Any) -> None:
    for name in oracle.about["projected"]:
        oracle.tensors[f"rand.3.{name}"] = 1 - oracle.tensors[f"rand.3.{name}"]


def other_limit(oracle: Any) -> None:
    oracle.about["nl_gamma"] = 1.02


@pytest.mark.parametrize(
    ("file", "mistake"),
    [
        ("q_apollo_mini__tensor_sr", other_noise),
        ("q_apollo_mini__tensor_sr", other_limit),
        ("q_apollo__channel_nearest", other_limit),
    ],
)
def test_a_mistake_is_noticed(file: str, mistake: Callable[[Any], None]) -> None:
    oracle = follow_oracle.read_oracle(ORACLES / f"{file}.safetensors")
    mistake(oracle)
    assert follow_oracle.FOLLOWERS["q_apollo"](oracle).verdict.startswith("FAIL")


@every_name
@pytest.mark.parametrize("states", ["8bit", "bf16"])
def test_projected_moments_are_never_in_few_bits(name: str, states: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.states"):
        build_method(name, {"states": states})


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_two_float32_moments_and_numbers(name: str, dtype: torch.dtype) -> None:
    m, n, rank = 512, 384, 1 if name == "q_apollo_mini" else 16
    weight = GroupedWeight.of(torch.zeros(m, n, dtype=dtype))
    optimizer = Optimizer("fused", seed=0)
    method = build_method(name, {"rank": rank, "rest_states": "8bit", "min_8bit": 0})
    optimizer.add("mlp.up", weight, method.matrix, 0.0)
    optimizer.add("embedding", torch.zeros(m, n, dtype=dtype), method.other, 0.0)
    sizes = {key: value.nbytes for key, value in optimizer.state_tensors()}
    assert sizes["mlp.up/exp_avg"] == sizes["mlp.up/exp_avg_sq"] == 4 * m * rank
    assert sum(v for k, v in sizes.items() if k.startswith("mlp.up")) <= 8 * m * rank + 16
    assert sizes["embedding/exp_avg.codes"] == m * n


@every_name
def test_the_limiter_sees_norms_after_the_bias_correction(name: str) -> None:
    """In the first update N = sign(R), whatever the betas; without correction it is 3.2 sign(R)."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(12, 8, generator=generator)
    method = build_method(name, {"rank": 4, "per": "tensor"}).matrix
    state = method.init(torch.zeros(12, 8), Place())
    method.refresh(grad, state)
    method.update(method.compress(grad, state), state)
    moment = tensor(state, "exp_avg").double() / 0.1  # that is R
    expected = grad.double().norm() * moment.numel() ** 0.5 / moment.norm()
    assert tensor(state, "limiter_norm").item() == pytest.approx(expected.item(), rel=1e-5)


def test_mini_is_q_apollo_with_one_rank_and_one_factor() -> None:
    mini = build_method("q_apollo_mini", {}).matrix
    assert mini == build_method("q_apollo", {"rank": 1, "per": "tensor", "scale": 128.0}).matrix
