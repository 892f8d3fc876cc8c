"""Layer-major order against plain accumulation over the same micro-batches."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig, OptimizerConfig
from lowmem.model.llama import Llama
from lowmem.optim.assign import build_optimizer
from lowmem.optim.curvature import weights_due
from lowmem.optim.methods import METHODS, method_spec
from lowmem.optim.optimizer import Optimizer
from lowmem.optim.step import gather
from lowmem.planner.speed import block_bytes, boundary_bytes

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "attention_bias": True,
    "mlp_bias": True,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
UPDATES = 3


@dataclass
class Trained:
    """What some updates have made. told: (loss, gradient norm) of each."""

    told: list[tuple[float, float]]
    tensors: dict[str, Tensor]
    model: Llama
    optimizer: Optimizer


def trained(
    mode: Any,
    settings: dict[str, Any],
    weights: str = "fp32",
    *,
    sizes: tuple[int, ...] = (2, 2, 1),
    boundaries: Any = "keep",
    blocks: Any = "device",
    recompute: str = "attn",
    **shape: Any,
) -> Trained:
    """Updates of the same random text, in micro-batches of these sizes."""
    config = ModelConfig.model_validate(SHAPE | shape)
    model = Llama(
        config,
        dtype=DTYPES[weights],
        device="cpu",
        int8=weights == "int8",
        recompute=recompute,
        boundaries=boundaries,
        blocks=blocks,
    )
    model.initialise(0)
    optimizer = build_optimizer(
        OptimizerConfig.model_validate(settings),
        model.weights(),
        model.roles(),
        mode=mode,
        seed=0,
        head_dim=config.head_dim,
    )
    optimizer.attach(model)
    text, told = torch.Generator().manual_seed(1), []
    for _ in range(UPDATES):
        batch = [
            (
                torch.randint(0, config.vocab_size, (rows, 16), generator=text),
                torch.randint(0, config.vocab_size, (rows, 16), generator=text),
            )
            for rows in sizes
        ]
        batch[0][1][0, :5] = -100  # micro-batches count by their targets
        tokens = sum(int((targets >= 0).sum()) for _, targets in batch)
        loss, norm = gather(
            model, optimizer, batch, count=len(sizes), tokens=tokens, lr=0.01, clip=None
        )
        optimizer.step()
        told.append((loss.item(), norm.item()))
    tensors = {**model.state_dict(), **dict(optimizer.state_tensors())}
    return Trained(told, tensors, model, optimizer)


def assert_same(one: Trained, other: Trained) -> None:
    """Losses, norms, weights and states, bit for bit."""
    assert one.told == other.told
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert one.optimizer.state_numbers() == other.optimizer.state_numbers()


def settings_of(method: str) -> dict[str, Any]:
    """Small, and with a new subspace in the second or third update."""
    small = {"rank": 4, "gap": 2, "history": 3, "min_8bit": 0}
    takes = method_spec(method).arguments
    return {"method": method} | {key: value for key, value in small.items() if key in takes}


VARIANTS = {
    "galore-8bit": {**settings_of("galore"), "states": "8bit"},
    "galore-whole": {**settings_of("galore"), "staggered": False},
    "frugal-blocks": {"method": "frugal", "gap": 2, "density": 0.5},
    "adamw-bf16": {"method": "adamw", "states": "bf16", "weight_decay": 0.1},
}
CASES = {name: settings_of(name) for name in METHODS} | VARIANTS


@pytest.mark.parametrize("weights", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("sophia", "adahessian")])
def test_layer_major_equals_accumulation_bit_for_bit(case: str, weights: str) -> None:
    """With everything that can be in host memory there."""
    plain = trained("unfused", CASES[case], weights)
    host = {**CASES[case], "place": "host"}
    found = trained("layer-major", host, weights, boundaries="host", blocks="host")
    assert_same(plain, found)


@pytest.mark.parametrize(
    ("boundaries", "place", "blocks"),
    [("keep", "device", "device"), ("host", "device", "device"), ("keep", "host", "host")],
)
@pytest.mark.parametrize("sizes", [(3,), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_no_place_and_no_number_of_micro_batches_changes_a_bit(
    weights: str, sizes: tuple[int, ...], boundaries: str, place: str, blocks: str
) -> None:
    case = {**VARIANTS["galore-8bit"], "place": place}
    plain = trained("unfused", VARIANTS["galore-8bit"], weights, sizes=sizes)
    found = trained("layer-major", case, weights, sizes=sizes, boundaries=boundaries, blocks=blocks)
    assert_same(plain, found)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_tied_embeddings_differ_by_the_rounding_of_one_sum(weights: str) -> None:
    """Their gradient is the sum of 2 k parts, of head and embedding: first all of the head, then
    all of the embedding, in float32. Plain accumulation adds the two of each micro-batch first, in
    the compute dtype."""
    plain = trained("unfused", {"method": "sgd_sai"}, weights, tie_word_embeddings=True)
    found = trained("layer-major", {"method": "sgd_sai"}, weights, tie_word_embeddings=True)
    assert found.told[0][0] == plain.told[0][0]  # the loss before any step
    # bf16: sums of two parts rounded to 8 bits; fp32: another order of six terms of 24 bits.
    bound = {"fp32": 1e-6, "bf16": 4e-3}[weights]
    assert found.told[0][1] == pytest.approx(plain.told[0][1], rel=bound)


def test_sophia_and_adahessian_are_refused_by_what_they_need() -> None:
    optimizer = trained("unfused", {"method": "adamw"}).optimizer
    assert not weights_due(optimizer)
    with pytest.raises(ValueError, match="curvature needs whole gradients"):
        trained("layer-major", {"method": "sophia"})


def test_the_norm_is_that_of_the_whole_gradient() -> None:
    """By autograd's own gradient of the whole batch, in float64."""
    found = trained("layer-major", {"method": "adamw"}, sizes=(2, 2))
    reference = Llama(
        found.model.config, dtype=torch.float32, device="cpu", attention="auto", recompute="keep"
    )
    reference.initialise(0)
    text = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 300, (2, 16), generator=text) for _ in range(4)]
    drawn[1][0, :5] = -100
    inputs, targets = torch.cat(drawn[0::2]), torch.cat(drawn[1::2])
    reference.loss(inputs, targets, int((targets >= 0).sum())).backward()
    grads = [p.grad.double() for p in reference.parameters() if p.grad is not None]
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()
    assert found.told[0][1] == pytest.approx(norm, rel=1e-5)  # float32 sums
    assert found.optimizer.norm_of == "gradient, afterwards"


def test_blocks_in_host_memory_take_no_other_order() -> None:
    model = trained("layer-major", {"method": "adamw", "place": "host"}, blocks="host").model
    inputs = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="trained in layer-major order"):
        model.loss(inputs, inputs, 16)


def test_clipping_is_refused() -> None:
    optimizer = trained("layer-major", {"method": "adamw"}).optimizer
    with pytest.raises(ValueError, match="layer-major updates cannot be clipped"):
        optimizer.clip(torch.ones(()), 1.0)


def test_traffic_is_what_the_planner_prices() -> None:
    host = {"method": "adamw", "place": "host"}
    found = trained("layer-major", host, boundaries="host", blocks="host", attention_bias=False)
    tokens, config = 5 * 16, found.model.config
    to_device, to_host = boundary_bytes(config, tokens, element=4)
    transfers = found.model.boundaries.transfers
    assert transfers is not None
    assert (transfers.fetched, transfers.stored) == (UPDATES * to_device, UPDATES * to_host)
    states = found.optimizer.transfers
    assert states is not None
    of_all = sum(tensor.nbytes for _, tensor in found.optimizer.state_tensors())
    assert states.fetched == UPDATES * of_all
    assert states.stored == (UPDATES + 1) * of_all  # and once at the beginning
    assert found.model.residence is not None
    weights = found.model.residence.transfers
    blocks = [t for block in found.model.blocks for t in block.parameters()]
    small = sum(t.nbytes for t in blocks if t.dim() == 1)  # norms and biases are not priced
    to_device, to_host = block_bytes(config, "bf16")  # two bytes an element: here there are four
    assert weights.fetched == UPDATES * 2 * (to_device + small)
    assert weights.stored == UPDATES * (2 * to_host + small)


def test_evaluation_and_plain_losses_are_those_of_the_same_weights() -> None:
    plain = trained("unfused", {"method": "adamw"})
    host = {"method": "adamw", "place": "host"}
    found = trained("layer-major", host, boundaries="host", blocks="host")
    inputs = torch.arange(32).view(2, 16)
    assert torch.equal(plain.model.loss_sum(inputs, inputs), found.model.loss_sum(inputs, inputs))
