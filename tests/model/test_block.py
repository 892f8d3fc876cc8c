"""What lives at each moment of a block, on the meta device, against sums over the shapes."""

import resource
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lowmem.config.recompute import Level
from lowmem.config.schema import ModelConfig
from lowmem.kernels.dispatch import forced
from lowmem.model.llama import Llama
from lowmem.phases import current_phase
from tests.kernels.calls import Calls
from tests.model.sinks import Nothing


def rounded(count: int) -> int:
    return -(-count // 512) * 512


class LiveBytes(TorchDispatchMode):
    """Largest sum of the storages made inside, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = WeakIdKeyDictionary()
        self.live = 0
        self.peak: dict[str, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        name = "/".join(current_phase())
        self.peak[name] = max(self.peak.get(name, 0), self.live)
        return made

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen or not storage.nbytes():
            return
        size = rounded(storage.nbytes())
        self.seen[storage] = size
        self.live += size
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.live -= size


def rehearse(config: ModelConfig, rows: int, length: int, level: Level) -> LiveBytes:
    """One forward and backward that throws every gradient away."""
    model = Llama(config, dtype=torch.bfloat16, device="meta", recompute=level, attention="flash")
    model.sink = Nothing()
    inputs, targets = (
        torch.empty(rows, length, dtype=torch.int64, device="meta") for _ in range(2)
    )
    tracker = LiveBytes()
    for known in (*model.parameters(), inputs, targets, *model.rotation(length)):
        tracker.seen[known.untyped_storage()] = 0
    with tracker:
        model.loss(inputs, targets, inputs.numel()).backward()
    return tracker


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=256,
    )


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
def test_the_backward_of_a_block_holds_what_the_order_promises(
    config: ModelConfig, level: Level
) -> None:
    rows, length = 2, 256
    tracker = rehearse(config, rows, length, level)
    n, h, f, kv = rows * length, 512, 1408, 128
    x, k, wide = rounded(2 * n * h), rounded(2 * n * kv), rounded(2 * n * f)
    statistic, gate = rounded(4 * n), rounded(2 * h * f)
    attention = statistic + 2 * x + 2 * k + rounded(4 * n * 8) + 1024
    mlp = statistic + 2 * wide
    below = {"keep": 2 * x + attention + mlp, "attn": 2 * x + attention, "full": x}[level]
    scalars = 1024  # the loss and its gradient
    full = 3 * x + attention + mlp + scalars
    expected = {
        "mlp.down": full + wide + gate,
        "mlp.up": full + 2 * x + gate,
        "mlp.gate": full - wide + 2 * x + gate,
        "attention.o": 3 * x + attention + rounded(2 * h * h) + scalars,
        "attention.v": 5 * x + statistic + 2 * k + rounded(2 * h * kv) + scalars,
    }
    for block in (1, 2, 3):
        for role, size in expected.items():
            measured = tracker.peak[f"backward of block {block}/gradient of {role}"]
            assert measured == (block - 1) * below + size, (block, role)


SHAPES = {  # (hidden, intermediate, heads, key/value heads)
    "60m": (512, 1376, 8, 8),
    "7b": (4096, 11008, 32, 32),
    "llama3-8b": (4096, 14336, 32, 8),
}


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(1, 2048), (3, 77)])
@pytest.mark.parametrize("size", SHAPES)
def test_what_a_block_keeps_for_backward_is_the_sum_of_the_documented_tensors(
    size: str, rows: int, length: int, int8: bool, level: Level
) -> None:
    """docs/memory.md, "What is kept for backward"; each tensor rounded up to 512 B."""
    h, f, heads, kv_heads = SHAPES[size]
    config = ModelConfig(
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=h // heads,
    )
    model = Llama(config, dtype=torch.bfloat16, device="meta", attention="flash", int8=int8)
    n, kv = rows * length, kv_heads * h // heads
    x = torch.empty(n, h, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        _, kept = model.blocks[0](x, model.rotation(length), level)
    storages = (tensor.untyped_storage() for tensor in kept.values())
    found = sum({each._cdata: rounded(each.nbytes()) for each in storages}.values())
    block_input = rounded(2 * n * h)
    statistic = rounded(4 * n)
    attention = (
        statistic
        + rounded(2 * n * h)  # q
        + 2 * rounded(2 * n * kv)  # k, v
        + rounded(2 * n * h)  # its output
        + rounded(4 * n * heads)  # logsumexp
        + 1024  # two states of a generator
        + rounded(2 * n * h)  # x1
    )
    mlp = statistic + 2 * rounded(2 * n * f)
    wanted = {
        "full": block_input,
        "attn": block_input + attention,
        "keep": block_input + attention + mlp,
    }
    assert found == wanted[level]
    if (size, n) == ("7b", 2048):
        assert round(found / 2048 / 1024) == {"full": 8, "attn": 48, "keep": 91}[level]  # KiB


def test_nothing_is_left_when_the_backward_is_done(config: ModelConfig) -> None:
    tracker = rehearse(config, 2, 64, "keep")
    assert tracker.live == 0


@pytest.mark.parametrize("backend", ["cpu", "flash", "efficient"])
def test_seven_billion_parameters_on_meta_cost_no_memory(backend: str) -> None:
    config = ModelConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Llama(config, dtype=torch.bfloat16, device="meta", attention=backend)
    model.initialise(0)
    tokens = torch.empty(1, 2048, dtype=torch.int64, device="meta")
    model.loss(tokens, tokens, 2048).backward()
    model.loss_sum(tokens, tokens)
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    # KiB; one of its matrices would take 86 MiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
@pytest.mark.parametrize("intermediate", [64, 1408])
def test_kernels_hold_no_more_than_the_reference_at_any_phase(
    config: ModelConfig, level: Level, intermediate: int
) -> None:
    config = config.model_copy(update={"intermediate_size": intermediate})
    with forced("reference"):
        plain = rehearse(config, 2, 256, level).peak
    with forced("triton"):
        ours = rehearse(config, 2, 256, level).peak
    assert ours.keys() == plain.keys()
    assert all(ours[name] <= plain[name] for name in plain)
    if intermediate == 64 and level == "full":  # there float32 halves of q are what decides
        assert ours["forward of block 1"] < plain["forward of block 1"]


@pytest.mark.parametrize("backend", ["cpu", "flash", "efficient"])
@pytest.mark.parametrize("groups", [2, 8])
def test_every_tensor_that_a_kernel_takes_is_contiguous(
    config: ModelConfig, backend: str, groups: int
) -> None:
    config = config.model_copy(update={"num_key_value_heads": groups})
    model = Llama(config, dtype=torch.bfloat16, device="meta", attention=backend)
    tokens = torch.empty(2, 48, dtype=torch.int64, device="meta")
    with forced("triton"), Calls() as calls:
        model.loss(tokens, tokens, 96).backward()  # a kernel asserts it
        model.loss_sum(tokens, tokens)
    names = {operator.__name__.removesuffix(".default") for operator, _ in calls.kernels}
    assert names == {
        *("rms_norm", "rms_norm_again", "rms_norm_backward"),
        *("rotate", "swiglu", "swiglu_backward"),
    }
