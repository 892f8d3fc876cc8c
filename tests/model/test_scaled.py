"""Models whose linear layers multiply in 8 bits: how near to exact, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import Config, Matmul, ModelConfig
from lowmem.errors import HardwareError
from lowmem.model.llama import Llama
from lowmem.model.scaled import layer_type
from lowmem.train.build import require_hardware

CONFIG = ModelConfig(
    hidden_size=32,
    intermediate_size=53,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=61,
    attention_bias=True,
)


def made(matmul: Matmul, int8: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model = Llama(
        CONFIG, dtype=torch.float32, device="cpu", int8=int8, recompute="attn:1,full", matmul=matmul
    )
    model.initialise(3)
    found: dict[str, Tensor] = {}

    class Sink:
        def receive(self, name: str, gradient: Tensor) -> None:
            found[name] = gradient.clone()

        def receive_rows(self, name: str, start: int, rows: Tensor) -> None:
            found[f"{name}/{start}"] = rows.clone()

        def wants_survey(self, name: str) -> bool:
            return False

    model.sink = Sink()
    tokens = torch.arange(3 * 16).mul_(7).remainder_(61).view(3, 16)
    loss = model.loss(tokens, tokens, 48)
    loss.backward()
    return loss.detach(), found


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("matmul", "bound"), [("int8", 0.04), ("fp8", 0.16)])
def test_loss_and_gradients_are_near_the_exact_ones(
    matmul: Matmul, bound: float, int8: bool
) -> None:
    """A product is 1 % off in int8 and 4 % in fp8; two blocks add up a few of them."""
    (loss, wanted), (found, gradients) = made("exact", int8), made(matmul, int8)
    # A model that has learned nothing: its loss hardly hangs on its products, but it does.
    assert 0 < (found - loss).abs() <= {"int8": 1e-5, "fp8": 2e-4}[matmul] * loss
    assert gradients.keys() == wanted.keys()
    matrices = [name for name in gradients if "proj.weight" in name]
    assert len(matrices) == 14
    for name in matrices:
        error = (gradients[name] - wanted[name]).norm() / wanted[name].norm()
        assert 0 < error <= bound, name


@pytest.mark.parametrize("int8", [False, True])
def test_exact_products_are_the_layers_of_before(int8: bool) -> None:
    assert layer_type(int8=int8, matmul="exact").__name__ == ("Int8Linear" if int8 else "Linear")


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False)])
def test_fp8_needs_a_card_that_has_it(
    capability: Any, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "is_available": True,
        "get_device_capability": capability,
        "get_device_name": "a card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    train = {"weights": "bf16", "device": "cuda", "matmul": "fp8"}
    config = Config.model_validate({"model": "llama-tiny", "train": train})
    if not refused:
        return require_hardware(config)
    with pytest.raises(HardwareError, match="no products in fp8") as caught:
        require_hardware(config)
    assert "--matmul int8" in caught.value.fix
