import pytest
import torch

from lowmem.kernels.dispatch import forced
from lowmem.kernels.rope import frequencies, llama3_frequencies, rotate_, tables
from tests.kernels.calls import Calls

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("heads", [1, 3])
def test_pairs_turn_like_complex_numbers(heads: int) -> None:
    frequency = frequencies(8, 10000.0, CPU)
    x = torch.randn(2, 7, heads, 8)
    z = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angles = torch.arange(7).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    z = z * torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = rotate_(x.clone(), *tables(frequency, 7))
    # angles of up to 6 in float32
    torch.testing.assert_close(turned.double(), torch.cat([z.real, z.imag], -1), rtol=0, atol=3e-6)


def test_turning_back_undoes_the_turn_in_place() -> None:
    rotation = tables(frequencies(16, 500.0, CPU), 33)
    x = torch.randn(1, 33, 2, 16)
    turned = x.clone()
    assert rotate_(turned, *rotation) is turned
    assert not torch.allclose(turned, x)
    torch.testing.assert_close(rotate_(turned, *rotation, back=True), x, rtol=0, atol=1e-6)


def test_bf16_is_rounded_once() -> None:
    rotation = tables(frequencies(16, 500.0, CPU), 9)
    x = torch.randn(2, 9, 2, 16).bfloat16()
    exact = rotate_(x.float(), *rotation).bfloat16()
    assert torch.equal(rotate_(x.clone(), *rotation), exact)


@pytest.mark.parametrize("width", [4, 64, 128])
def test_frequencies_equal_transformers(width: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    ours = llama3_frequencies(frequencies(width, 500000.0, CPU), 8.0, 1.0, 4.0, 64)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (1, 1, 1, 2), (2, 7, 3, 96), (3, 33, 1, 6)])
def test_triton_turns_as_the_reference_and_takes_no_memory(
    shape: tuple[int, int, int, int], back: bool, dtype: torch.dtype, triton_kernels: torch.device
) -> None:
    rotation = tables(frequencies(shape[-1], 500.0, triton_kernels), shape[1])
    x = torch.randn(shape).to(triton_kernels, dtype)
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), 1e-39])[: x.numel()].to(x)
    ours, theirs = x.clone(), x.clone()
    with Calls() as calls:
        assert rotate_(ours, *rotation, back=back) is ours
    assert [operator.__name__ for operator, _ in calls.kernels] == ["rotate.default"]
    assert calls.operators == 1
    with forced("reference"):
        rotate_(theirs, *rotation, back=back)
    if triton_kernels.type == "cpu":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    else:  # where addcmul may fuse otherwise
        off = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours, theirs, rtol=off, atol=1e-6, equal_nan=True)
