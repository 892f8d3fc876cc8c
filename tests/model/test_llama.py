"""The model against transformers.LlamaForCausalLM on the same weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.config.schema import ModelConfig
from lowmem.kernels.dispatch import forced
from lowmem.model.llama import Llama
from tests.model.sinks import Whole


@pytest.fixture(autouse=True)
def several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the vocabulary of 61."""
    monkeypatch.setattr("lowmem.kernels.linear_cross_entropy.SLICE_ROWS", 16)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one key": {"num_key_value_heads": 1, "head_dim": 6},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "one block": {"num_hidden_layers": 1},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "padding": {"pad_token_id": 3, "tie_word_embeddings": True},
}


def pair(recompute: Any = "keep", **changes: Any) -> tuple[Llama, LlamaForCausalLM]:
    """Ours and theirs with the same weights, biases and norms away from 0 and 1."""
    fields = copy.deepcopy({"pad_token_id": None, **SMALL, **changes})
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(fields), initializer_range=0.1))
    if "rope_scaling" in fields:
        scaling = dict(fields["rope_scaling"])
        fields["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    ours = Llama(ModelConfig(**fields), dtype=torch.float32, device="cpu", recompute=recompute)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            ours.get_parameter(name).copy_(parameter)
    return ours, theirs


def batch(rows: int = 2, length: int = 19) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 61, (rows, length), generator=generator)
    targets = torch.randint(0, 61, (rows, length), generator=generator)
    targets[0, : length // 2] = -100
    inputs[0, 0] = 3
    return inputs, targets


def gradients(model: Llama) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "length"), [(2, 19), (1, 5), (3, 1)])
def test_logits_and_every_gradient_equal_transformers(shape: str, rows: int, length: int) -> None:
    ours, theirs = pair(**SHAPES[shape])
    inputs, targets = batch(rows, length)
    logits = theirs(inputs).logits
    # float32: three blocks of a few dozen roundings on logits of size 1
    torch.testing.assert_close(ours.logits(inputs), logits.detach(), rtol=0, atol=1e-5)
    slow = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 7
    slow.backward()
    loss = ours.loss(inputs, targets, total_tokens=7)
    loss.backward()
    torch.testing.assert_close(loss, slow, rtol=1e-6, atol=0)
    for name, gradient in gradients(ours).items():
        theirs_gradient = theirs.get_parameter(name).grad
        # Another order of summation, nothing else. Gradients of q and k are 0 where a row sees only
        # itself, but for the rounding of differences of size 0.1: hence the floor.
        atol = 1e-5 * max(0.05, float(theirs_gradient.abs().max()))
        torch.testing.assert_close(gradient, theirs_gradient, rtol=0, atol=atol, msg=name)


def test_loss_sum_is_the_loss_without_its_divisor() -> None:
    ours, _ = pair()
    inputs, targets = batch()
    torch.testing.assert_close(ours.loss_sum(inputs, targets), ours.loss(inputs, targets, 1))
    assert not ours.loss_sum(inputs, targets).requires_grad


@pytest.mark.parametrize("shape", ["plain", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_the_same_bits(shape: str, dtype: torch.dtype) -> None:
    made = []
    for keep in (False, True):
        ours, _ = pair(**SHAPES[shape])
        ours.to(dtype)
        ours.keep_logits = keep
        loss = ours.loss(*batch(), 29)
        loss.backward()
        made.append({"loss": loss.detach(), **gradients(ours)})
    for name, gradient in made[0].items():
        assert torch.equal(gradient, made[1][name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_recompute_levels_give_the_same_bits(shape: str) -> None:
    made = []
    for level in ("keep", "attn", "full"):
        ours, _ = pair(level, **SHAPES[shape])
        ours.loss(*batch(), 29).backward()
        made.append(gradients(ours))
    for other in made[1:]:
        for name, gradient in made[0].items():
            assert torch.equal(gradient, other[name]), name


def test_micro_batches_add_up_to_the_batch() -> None:
    ours, _ = pair()
    inputs, targets = batch(rows=4)
    ours.loss(inputs, targets, 67).backward()
    whole = {name: gradient.clone() for name, gradient in gradients(ours).items()}
    ours.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        ours.loss(inputs[part], targets[part], 67).backward()
    for name, gradient in gradients(ours).items():
        # float32 sums in another order
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient_is_handed_over_exactly_once(shape: str) -> None:
    ours, _ = pair(**SHAPES[shape])
    names: list[str] = []
    ours.sink = Whole(ours, lambda name, gradient: names.append(name))
    ours.loss(*batch(), 29).backward()
    assert sorted(names) == sorted(ours.roles())
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("level", ["keep", "attn", "full"])
@pytest.mark.parametrize("shape", ["grouped", "tied", "biases"])
def test_a_sink_that_changes_weights_at_once_changes_no_other_gradient(
    level: str, shape: str
) -> None:
    ours, _ = pair(level, **SHAPES[shape])
    ours.loss(*batch(), 29).backward()
    calm = gradients(ours)
    seen: dict[str, Tensor] = {}

    class Disturbing:
        def receive(self, name: str, gradient: Tensor) -> None:
            seen[name] = gradient.clone()
            gradient.fill_(torch.nan)
            ours.get_parameter(name).data.fill_(torch.nan)

        def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
            whole = seen.setdefault(name, torch.empty(0, rows.shape[1]))
            assert start == len(whole)
            seen[name] = torch.cat([whole, rows])
            rows.fill_(torch.nan)
            ours.get_parameter(name).data[start : start + len(rows)].fill_(torch.nan)

    ours.sink = Disturbing()
    ours.loss(*batch(), 29).backward()
    for name, gradient in calm.items():
        assert torch.equal(seen[name], gradient), name


def test_an_incoming_gradient_scales_all_gradients() -> None:
    ours, _ = pair()
    ours.loss(*batch(), 29).backward()
    once = gradients(ours)
    ours.zero_grad()
    (ours.loss(*batch(), 29) * 4).backward()
    for name, gradient in gradients(ours).items():
        assert torch.equal(gradient, once[name] * 4), name


def test_a_second_backward_is_refused() -> None:
    ours, _ = pair()
    loss = ours.loss(*batch(), 29)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_bf16_stays_close_to_float32() -> None:
    exact, _ = pair(num_key_value_heads=2)
    rough = Llama(exact.config, dtype=torch.bfloat16, device="cpu")
    rough.load_state_dict(exact.state_dict())
    inputs, targets = batch()
    for model in (exact, rough):
        model.loss(inputs, targets, 29).backward()
    ours, theirs = (model.loss_sum(inputs, targets) for model in (rough, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    for name, gradient in gradients(exact).items():
        error = (gradients(rough)[name].float() - gradient).norm() / gradient.norm()
        assert gradients(rough)[name].dtype == torch.bfloat16
        # 2^-9 per rounding, some hundred on the way up and down three blocks
        assert error < 0.05, name


def test_weights_follow_from_the_seed_on_every_dtype() -> None:
    config = ModelConfig(**SMALL, attention_bias=True, initializer_range=0.02)
    exact, rough = (
        Llama(config, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)
    )
    for model in (exact, rough):
        model.initialise(seed=5)
    for (name, a), b in zip(exact.named_parameters(), rough.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name
    weight = exact.get_parameter("model.layers.1.mlp.down_proj.weight")
    # 1,696 draws: the deviation's own deviation is 1.7 %
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weight, exact.get_parameter("model.layers.2.mlp.down_proj.weight"))
    assert exact.get_parameter("model.norm.weight").eq(1).all()
    assert exact.get_parameter("model.layers.0.self_attn.q_proj.bias").eq(0).all()
    again = Llama(config, dtype=torch.float32, device="cpu")
    again.initialise(seed=6)
    assert not torch.equal(
        again.get_parameter("lm_head.weight"), exact.get_parameter("lm_head.weight")
    )


def test_initialisation_does_not_depend_on_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(**SMALL)
    whole, sliced = (Llama(config, dtype=torch.float32, device="cpu") for _ in range(2))
    monkeypatch.setattr("lowmem.model.llama._DRAWN_ELEMENTS", 2**24)
    whole.initialise(0)
    monkeypatch.setattr("lowmem.model.llama._DRAWN_ELEMENTS", 16 * 32)
    sliced.initialise(0)
    # rows of a slice are multiples of 16 numbers, the unit in which torch draws
    assert torch.equal(
        whole.get_parameter("lm_head.weight"), sliced.get_parameter("lm_head.weight")
    )


def test_roles_name_every_parameter() -> None:
    ours, _ = pair(**SHAPES["biases"])
    roles = ours.roles()
    assert roles["model.layers.2.self_attn.o_proj.weight"] == "attention.o"
    assert roles["model.layers.0.mlp.gate_proj.weight"] == "mlp.gate"
    assert roles["model.layers.0.mlp.gate_proj.bias"] == "bias"
    assert roles["model.layers.1.post_attention_layernorm.weight"] == "norm"
    assert roles["model.norm.weight"] == "norm"
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert len(roles) == len(list(ours.parameters()))
    assert sum(p.numel() for p in ours.parameters()) == ours.config.parameters


def test_the_embedding_of_frequent_tokens_is_summed_in_float32() -> None:
    config = ModelConfig(**{**SMALL, "num_hidden_layers": 1})
    exact = Llama(config, dtype=torch.float32, device="cpu")
    exact.initialise(0)
    rough = Llama(config, dtype=torch.bfloat16, device="cpu")
    rough.load_state_dict(exact.state_dict())
    inputs = torch.zeros(16, 64, dtype=torch.int64)
    targets = torch.ones_like(inputs)
    name = "model.embed_tokens.weight"
    for model in (exact, rough):
        model.loss(inputs, targets, inputs.numel()).backward()
    ours, theirs = gradients(rough)[name][0].float(), gradients(exact)[name][0]
    # a bf16 sum of 1,024 like terms stops growing at 256 of them
    assert (ours - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where it could interpret")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_in_the_blocks_changes_nothing_but_roundings(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    exact, _ = pair(recompute="attn:1,full", **SHAPES["grouped"])
    model = exact.to(dtype)
    inputs, targets = batch()
    loss = model.loss(inputs, targets, 7)
    loss.backward()
    plain = gradients(model)
    model.zero_grad()
    with forced("triton"):
        ours = model.loss(inputs, targets, 7)
        ours.backward()
    bound = {torch.float32: 3e-6, torch.bfloat16: 3e-2}[dtype]  # a few roundings of each dtype
    torch.testing.assert_close(ours, loss, rtol=bound / 10, atol=0)
    for name, gradient in gradients(model).items():
        error = (gradient.double() - plain[name].double()).norm() / plain[name].double().norm()
        assert error < bound, name
