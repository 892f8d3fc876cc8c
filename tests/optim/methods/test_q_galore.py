"""Q-GaLore: what its recorded files must catch, and what 8-bit weights need to be trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import follow_oracle  # type: ignore[import-not-found]  # a script, on pytest's path
import pytest
import torch
from torch import Tensor

from lowmem.errors import ConfigError
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.kernels.groupwise import Noise, uniform
from lowmem.optim.methods import build_method
from lowmem.optim.optimizer import Optimizer
from lowmem.train.diagnose import figures_of

ORACLES = Path(__file__).parents[1] / "oracles"


def later_noise(oracle: Any) -> None:
    for name in oracle.about["projected"]:
        for update in range(oracle.about["T"] - 1):
            oracle.tensors[f"rand.{update}.{name}"] = oracle.tensors[f"rand.{update + 1}.{name}"]


def another_threshold(oracle: Any) -> None:
    oracle.about["cos_threshold"] = 0.995


def unsigned_cosine(oracle: Any) -> None:
    oracle.about["cosines"]["tall"][1] *= -1


def decay_of_plain_parameters_after(oracle: Any) -> None:
    oracle.about["weight_decay"] = 0.0


def another_group(oracle: Any) -> None:
    oracle.about["proj_group"] *= 2


def unlike_codes(oracle: Any) -> None:
    oracle.tensors["projq.0.tall"][0, :3] ^= 1


@pytest.mark.parametrize(
    ("file", "mistake"),
    [
        ("full_sr_8bit", later_noise),
        ("int4proj_lazy", another_threshold),
        ("int8w_nearest", unsigned_cosine),
        ("int8w_nearest", decay_of_plain_parameters_after),
        ("full_sr_8bit", another_group),
        ("int4proj_lazy", unlike_codes),
    ],
)
def test_a_mistake_is_noticed(file: str, mistake: Callable[[Any], None]) -> None:
    oracle = follow_oracle.read_oracle(ORACLES / f"q_galore__{file}.safetensors")
    mistake(oracle)
    assert follow_oracle.FOLLOWERS["q_galore"](oracle).verdict.startswith("FAIL")


def trained(noise: Noise | None) -> float:
    """Share of the way to a target that is left after 300 small steps of an 8-bit weight."""
    generator = torch.Generator().manual_seed(3)
    way = torch.randn(64, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    weight = GroupedWeight.of(torch.randn(64, 40, generator=generator) * 2, 256, noise)
    target = weight.values() + way
    method = build_method("q_galore", {"rank": 4, "gap": 10, "scale": 1.0, "basis_group": 40})
    optimizer = Optimizer("fused", seed=5)
    optimizer.add("weight", weight, method.matrix, 0.0)
    for update in range(300):
        optimizer.begin(0.06 * (1 - update / 300), 1)  # 0.02 a weight at first; a code is 0.05
        optimizer.receive("weight", weight.values() - target)
    return ((weight.values() - target).norm() / way.norm()).item()


def test_small_steps_train_8_bit_weights_only_with_stochastic_rounding() -> None:
    """What is left with it is the rounding itself: 300 draws of a code, against a way of 35."""
    assert trained(uniform) < 0.4
    assert trained(None) > 0.7


def test_a_matrix_that_hardly_changes_is_refreshed_less_often() -> None:
    generator = torch.Generator().manual_seed(4)

    def low_rank() -> Tensor:
        return torch.randn(48, 4, generator=generator) @ torch.randn(4, 32, generator=generator)

    method = build_method("q_galore", {"rank": 4, "gap": 2, "queue": 2, "basis_group": 16}).matrix
    optimizer, fixed = Optimizer("fused", seed=5), low_rank()
    for name in ("steady", "changing"):
        optimizer.add(name, torch.zeros(48, 32), method, 0.0)
    for _ in range(40):
        optimizer.begin(0.01, 1)
        optimizer.receive("steady", fixed + 0.1 * low_rank())
        optimizer.receive("changing", low_rank())
    gaps = {name: slot.state["gap"] for name, slot in optimizer.slots.items()}
    assert gaps == {"steady": 16, "changing": 2}
    assert figures_of(optimizer)["gap"] == 9.0


def test_state_has_the_bytes_of_the_formula() -> None:
    """Basis r s / 2 + 8 per group, moments 2 (r b + 4 ceil(r b / 256)); no byte per code."""
    m, n, rank, group = 11008, 4096, 1024, 256
    optimizer = Optimizer("unfused", seed=0)
    weight = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    method = build_method("q_galore", {"rank": rank, "basis_group": group})
    optimizer.add("mlp.up", weight, method.matrix, 0.0)
    found = sum(value.nbytes for _, value in optimizer.state_tensors())
    basis = rank * n // 2 + 8 * (rank * n // group)
    moments = 2 * (rank * m + 4 * -(-rank * m // 256))
    assert found == pytest.approx(basis + moments, abs=100)  # queue and log


@pytest.mark.parametrize(
    "option", [{"basis_bits": 3}, {"gamma": 0.5}, {"queue": 0}, {"theta": "x"}]
)
def test_unsuitable_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(option))}"):
        build_method("q_galore", option)
