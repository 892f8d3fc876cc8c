"""Storage formats: bytes, round trips, and the two traps of low precision."""

import pytest
import torch

from lowmem.optim.formats import State, format_named, tensor
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, whole


def moments_after_quiet(states: str, updates: int = 3000) -> torch.Tensor:
    """Second moment after the gradient's variance dropped a hundredfold."""
    rule = Adam(format=format_named(states, min_elements=0))
    state: State = {"step": 0, "seed": 1}
    rule.init(state, torch.zeros(1024), Place())
    generator = torch.Generator().manual_seed(2)
    for k in range(1, updates + 1):
        state["step"] = k
        size = 1.0 if k < 500 else 0.1
        whole(rule, size * torch.randn(1024, generator=generator), state)
    return rule.format.load(state, "exp_avg_sq", slice(0, 1024))


def test_a_bf16_second_moment_decays() -> None:
    """Rounded to nearest, bf16 * 0.999 is itself and the moment only ever grows."""
    exact = moments_after_quiet("fp32").mean()
    assert exact < 0.1
    assert moments_after_quiet("bf16").mean() == pytest.approx(exact.item(), rel=0.05)


def test_an_8bit_second_moment_is_never_zero_for_a_seen_gradient() -> None:
    """Stored as zero it would divide the next step by almost nothing."""
    gradient = torch.full((256,), 1e-5)
    gradient[0] = 1.0  # sets the block's scale
    for floor, zeros in ((True, 0), (False, 255)):
        rule = Adam(format=format_named("8bit", min_elements=0, floor_codes=floor))
        state: State = {"step": 1, "seed": 0}
        rule.init(state, gradient, Place())
        whole(rule, gradient, state)
        stored = rule.format.load(state, "exp_avg_sq", slice(0, 256))
        assert (stored == 0).sum() == zeros


def test_tensors_below_the_threshold_stay_float32() -> None:
    state: State = {}
    format_named("8bit").zeros(state, "exp_avg", torch.empty(4095), signed=True)
    format_named("8bit").zeros(state, "exp_avg_sq", torch.empty(4096), signed=False)
    assert tensor(state, "exp_avg").dtype == torch.float32
    assert tensor(state, "exp_avg_sq.codes").dtype == torch.uint8
    assert tensor(state, "exp_avg_sq.absmax").shape == (16,)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_new_state_is_zero(states: str, signed: bool) -> None:
    state: State = {}
    form = format_named(states, min_elements=0)
    form.zeros(state, "x", torch.empty(300), signed)
    assert torch.equal(form.load(state, "x", slice(0, 300)), torch.zeros(300))


def test_bytes_per_element() -> None:
    """Section 6 of the 8-bit paper's arithmetic: 1 byte and 4/256 of a scale."""
    for states, expected in (("fp32", 4 * 65536), ("bf16", 2 * 65536), ("8bit", 65536 + 1024)):
        state: State = {}
        format_named(states).zeros(state, "x", torch.empty(65536, device="meta"), signed=True)
        assert sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor)) == expected
