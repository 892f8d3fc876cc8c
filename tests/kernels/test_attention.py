import pytest
import torch
from torch import Tensor

from lowmem.errors import ConfigError, HardwareError
from lowmem.kernels import attention as module
from lowmem.kernels.attention import Backend, attention, attention_backward, choose_backend

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of masked scores, every head by itself."""
    length, heads, width = q.shape[1:]
    k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / width**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def draw(length: int, heads: int, groups: int, width: int) -> list[Tensor]:
    return [torch.randn(2, length, count, width) for count in (heads, groups, groups)]


@pytest.mark.parametrize(("length", "heads", "groups", "width"), [(1, 2, 2, 4), (37, 4, 2, 6)])
def test_output_and_gradients_equal_the_formula(
    length: int, heads: int, groups: int, width: int
) -> None:
    q, k, v = draw(length, heads, groups, width)
    grad = torch.randn_like(q)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    slow = formula(*leaves)
    slow.backward(grad.double())
    out, kept = attention(q, k, v, "cpu")
    made = attention_backward(grad, q, k, v, out, kept, "cpu")
    # float32 sums of up to 37 products
    torch.testing.assert_close(out.double(), slow.detach(), rtol=0, atol=5e-6)
    for ours, leaf in zip(made, leaves, strict=True):
        torch.testing.assert_close(ours.double(), leaf.grad, rtol=0, atol=1e-5)


def test_repeated_heads_sum_their_gradients() -> None:
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    wide = module._repeat_heads(x, 6)
    grad = torch.randn_like(wide)
    wide.backward(grad)
    torch.testing.assert_close(module._sum_heads(grad, 2), x.grad)


@pytest.mark.parametrize("backend", ["cpu", "flash", "efficient"])
def test_meta_keeps_no_quadratic_tensor(backend: Backend) -> None:
    q, k, v = (t.to(META, torch.bfloat16) for t in draw(128, 4, 2, 16))
    out, kept = attention(q, k, v, backend)
    assert out.shape == q.shape
    assert out.transpose(1, 2).stride() == q.transpose(1, 2).stride()
    assert kept.logsumexp.shape == (2, 4, 128)
    assert kept.logsumexp.dtype == torch.float32
    assert len(kept.rng) == (0 if backend == "cpu" else 2)
    made = attention_backward(torch.empty_like(out), q, k, v, out, kept, backend)
    assert [t.shape for t in made] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "backend"),
    [
        ("auto", CPU, torch.float32, "cpu"),
        ("sdpa", CPU, torch.bfloat16, "cpu"),
        ("auto", CUDA, torch.bfloat16, "flash"),
        ("auto", CUDA, torch.float32, "efficient"),
        ("flash", META, torch.bfloat16, "flash"),
        ("flash-attn", META, torch.bfloat16, "flash"),
    ],
)
def test_backend_follows_the_device(
    wanted: str, device: torch.device, dtype: torch.dtype, backend: str
) -> None:
    assert choose_backend(wanted, device, dtype, 64) == backend


def test_backends_that_cannot_run_are_refused() -> None:
    with pytest.raises(HardwareError, match="flash-attn"):
        choose_backend("flash-attn", CPU, torch.bfloat16, 64)
    with pytest.raises(ConfigError, match="head_dim = 20"):
        choose_backend("auto", CUDA, torch.bfloat16, 20)
    with pytest.raises(ValueError, match="eager"):
        choose_backend("eager", CPU, torch.float32, 64)
    with pytest.raises(ValueError, match="meta"):
        choose_backend("auto", META, torch.float32, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("flash", torch.bfloat16, 2e-2), ("efficient", torch.float32, 1e-4)],
)
def test_cuda_kernels_equal_the_formula(
    backend: Backend, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = (t.to("cuda", dtype) for t in draw(96, 4, 2, 32))
    grad = torch.randn_like(q)
    leaves = [t.double().cpu().requires_grad_() for t in (q, k, v)]
    slow = formula(*leaves)
    slow.backward(grad.double().cpu())
    out, kept = attention(q, k, v, backend)
    made = attention_backward(grad, q, k, v, out, kept, backend)
    # bf16 has 8 bits; tf32 may round float32 products to 11
    torch.testing.assert_close(out.double().cpu(), slow.detach(), rtol=0, atol=tolerance)
    for ours, leaf in zip(made, leaves, strict=True):
        torch.testing.assert_close(
            ours.double().cpu(), leaf.grad, rtol=tolerance, atol=5 * tolerance
        )
