"""Every method's rehearsed update against the same one on real tensors, to the byte."""

from typing import Any

import pytest

from lowmem.config.schema import OptimizerConfig
from lowmem.optim.methods import METHODS, method_spec
from lowmem.planner.rehearse import rehearse
from tests.planner.test_rehearse import MODEL, SLOW_INT8, choice, real_peak

VARIANTS: dict[str, dict[str, Any]] = {
    "galore-svd": {"method": "galore", "rank": 16, "solver": "svd"},
    "galore-rotate": {"method": "galore", "rank": 16, "on_refresh": "rotate"},
    "natural_galore-one-sided": {"method": "natural_galore", "rank": 8, "two_sided": False},
    "magma-apollo": {"method": "magma", "base": "apollo", "base_options": {"rank": 16}},
}


def settings(name: str) -> dict[str, Any]:
    if name in VARIANTS:
        return VARIANTS[name]
    takes = method_spec(name).arguments
    return {"method": name} | ({"rank": 16} if "rank" in takes and "mini" not in name else {})


@pytest.mark.parametrize("weights", ["fp32", "bf16", SLOW_INT8])
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_meta_equals_real_to_the_byte(name: str, weights: str) -> None:
    if name == "adahessian" and weights != "fp32":
        pytest.skip("refused: differences of gradients need float32 weights")
    optimizer = OptimizerConfig.model_validate(settings(name))
    how = choice("unfused", "full", weights, accumulate=1)
    rehearsed = rehearse(MODEL, optimizer, how, 32, attention="cpu", updates=2)
    assert rehearsed.tensors == real_peak(optimizer, how, 32)
    assert sum(rehearsed.parts.values()) == rehearsed.tensors
