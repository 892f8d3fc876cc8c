"""Blocks whose matrices are 8-bit codes, against the same blocks with what the codes stand for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import ModelConfig
from lowmem.kernels import int8_linear
from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.model.block import Linear
from lowmem.model.int8 import GROUP, Int8Linear
from lowmem.model.llama import Llama
from lowmem.planner.live_bytes import LiveBytes
from tests.model.sinks import Whole

WIDTHS = [(64, 48), (33, 300), (300, 7), (5, 3)]  # inputs, outputs; groups run through odd rows
FIELDS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> tuple[Int8Linear, Linear]:
    """A layer in codes, and one with the values of these codes."""
    coded = Int8Linear(inputs, outputs, bias, dtype=dtype, device="cpu")
    plain = Linear(inputs, outputs, bias, dtype=dtype, device="cpu")
    with torch.no_grad():
        coded.weight.store(draw(outputs, inputs) * 0.02)
        plain.weight.copy_(coded.weight.values())
        if coded.bias is not None and plain.bias is not None:
            coded.bias.copy_(draw(outputs, seed=1))
            plain.bias.copy_(coded.bias)
    return coded, plain


def products(layer: Int8Linear | Linear, dtype: torch.dtype) -> list[Tensor]:
    """All four that a block asks for."""
    weight = layer.weight
    outputs, inputs = weight.shape
    x, grad = draw(9, inputs, seed=2).to(dtype), draw(9, outputs, seed=3).to(dtype)
    residual, total = draw(9, outputs, seed=4).to(dtype), draw(9, inputs, seed=5).to(dtype)
    with torch.no_grad():
        layer.add_input_gradient(total, grad)
        return [layer(x), layer.add_to(residual, x), layer.input_gradient(grad), total]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_layer_in_codes_has_the_bits_of_one_with_their_values(
    widths: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    coded, plain = layers(*widths, bias, dtype)
    for mine, theirs in zip(products(coded, dtype), products(plain, dtype), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_slices_change_nothing_but_the_order_of_sums(
    widths: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_linear, "SLICE_ELEMENTS", 128)
    coded, plain = layers(*widths, bias, torch.float32)
    assert len(list(int8_linear._slices(coded.weight))) == {64: 24, 33: 3, 300: 1, 5: 1}[widths[0]]
    for mine, theirs in zip(
        products(coded, torch.float32), products(plain, torch.float32), strict=True
    ):
        # sums of at most 300 products of size 0.02 in float32
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "tokens", "slices"), [("cpu", 4, 1), ("meta", 256, 0), ("meta", 260, 1)]
)
def test_one_slice_is_all_the_full_precision_there_is(
    device: str, tokens: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where a card reads codes."""
    monkeypatch.setattr(int8_linear, "SLICE_ELEMENTS", 512 * 64)
    layer = Int8Linear(512, 640, False, dtype=torch.bfloat16, device=device)
    where: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x, grad = (torch.zeros(tokens, width, **where) for width in (512, 640))
    floats = 2 * 512 * 64 * slices
    for made, call in (
        (2 * tokens * 640, lambda: layer(x)),
        (2 * tokens * 512, lambda: layer.input_gradient(grad)),
        (0, lambda: layer.add_input_gradient(x, grad)),
    ):
        tracker = LiveBytes(device)
        tracker.track([*layer.buffers(), x, grad], "weights")
        before = tracker.live
        with tracker, torch.no_grad():
            call()
        assert tracker.peak == before + made + floats


def models(
    dtype: torch.dtype = torch.float32, *, int8_ends: bool = False, **changes: Any
) -> tuple[Llama, Llama]:
    """A model in codes, and one with the values of its codes."""
    config = ModelConfig(**{**FIELDS, **changes})
    coded = Llama(config, dtype=dtype, device="cpu", int8=True, int8_ends=int8_ends)
    plain = Llama(config, dtype=dtype, device="cpu")
    coded.initialise(3)
    with torch.no_grad():
        for name, weight in coded.weights().items():
            exact = weight if isinstance(weight, Tensor) else weight.values()
            plain.get_parameter(name).copy_(exact)
    return coded, plain


def gradients(model: Llama) -> tuple[Tensor, dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    model.sink = Whole(model, found.__setitem__)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(61, (2, 2, 19), generator=generator)
    loss = model.loss(inputs, targets, 38)
    loss.backward()
    return loss, found


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_a_model_in_codes_has_the_bits_of_one_with_their_values(
    changes: dict[str, Any], dtype: torch.dtype, level: Any
) -> None:
    coded, plain = models(dtype, **changes)
    coded.recompute = plain.recompute = level
    (mine, made), (theirs, expected) = gradients(coded), gradients(plain)
    assert torch.equal(mine, theirs)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    tokens = torch.arange(24).reshape(2, 12)
    assert torch.equal(coded.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hidden_size", [32, 128])  # rows inside of groups, and whole groups
def test_ends_in_codes_have_the_bits_of_their_values(
    hidden_size: int,
    tied: bool,
    keep_logits: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 16)  # four slices
    coded, plain = models(dtype, int8_ends=True, hidden_size=hidden_size, tie_word_embeddings=tied)
    coded.keep_logits = plain.keep_logits = keep_logits
    assert isinstance(coded.head_weight, GroupedWeight)
    (mine, made), (theirs, expected) = gradients(coded), gradients(plain)
    assert torch.equal(mine, theirs)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    tokens = torch.arange(24).reshape(2, 12)
    assert torch.equal(coded.logits(tokens), plain.logits(tokens))
    assert torch.equal(coded.loss_sum(tokens, tokens), plain.loss_sum(tokens, tokens))
    drawn = [model.drawn_loss(tokens, tokens, 24, seed=1).detach() for model in (coded, plain)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("width", [5, 48, 128, 256])
def test_picked_rows_are_those_of_the_whole(width: int) -> None:
    weight = GroupedWeight.of(draw(61, width), GROUP)
    index = torch.tensor([60, 0, 3, 3, 59])
    assert torch.equal(weight.picked(index), weight.values()[index])


def test_a_lookup_and_a_head_never_make_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 16)
    coded, _ = models(int8_ends=True)
    made: list[int] = []
    plain = GroupedWeight.values

    def counting(weight: GroupedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
        if weight.shape[1] == 32:
            made.append(weight.shape[0])
        return plain(weight, dtype)

    monkeypatch.setattr(GroupedWeight, "values", counting)
    coded.model.layers = torch.nn.ModuleList()
    gradients(coded)
    assert made == 2 * [16, 16, 16, 13]


def test_weights_have_the_names_the_order_and_the_roles_of_a_float_model() -> None:
    coded, plain = models(attention_bias=True, tie_word_embeddings=True)
    assert list(coded.weights()) == list(plain.weights())
    assert list(plain.weights()) == [name for name, _ in plain.named_parameters()]
    assert coded.roles() == plain.roles()
    matrices = [n for n, weight in coded.weights().items() if isinstance(weight, GroupedWeight)]
    assert len(matrices) == 7 * 3
    assert all(coded.roles()[name].startswith(("attention.", "mlp.")) for name in matrices)


def test_everything_that_is_stored_is_in_the_state_dict() -> None:
    coded, _ = models()
    sizes = {name: value.nbytes for name, value in coded.state_dict().items()}
    down = "model.layers.2.mlp.down_proj"
    groups = -(-32 * 53 // GROUP)
    assert sizes[f"{down}.codes"] == 32 * 53
    assert (sizes[f"{down}.scales"], sizes[f"{down}.zeros"]) == (4 * groups, groups)
    matrices = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 53 * 32)
    assert sum(v for k, v in sizes.items() if k.endswith("codes")) == matrices


def test_initial_codes_are_those_nearest_to_the_float_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig(**FIELDS, attention_bias=True)
    plain = Llama(config, dtype=torch.float32, device="cpu")
    plain.initialise(5)
    for elements in (2**24, 16 * 32):  # the second draws and quantises in many slices
        monkeypatch.setattr("lowmem.model.llama._DRAWN_ELEMENTS", elements)
        coded = Llama(config, dtype=torch.float32, device="cpu", int8=True, int8_ends=True)
        coded.initialise(5)
        for name, weight in coded.weights().items():
            exact = plain.get_parameter(name)
            if isinstance(weight, Tensor):
                assert torch.equal(weight, exact)
                continue
            nearest = GroupedWeight.of(exact, GROUP)
            assert torch.equal(weight.codes, nearest.codes)
            assert torch.equal(weight.scales, nearest.scales)
            assert torch.equal(weight.zeros, nearest.zeros)
