"""Blocks whose element-wise pieces torch.compile has made: the same numbers, no more memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.config.schema import Config, ModelConfig, OptimizerConfig
from lowmem.errors import HardwareError
from lowmem.kernels import compiled
from lowmem.kernels.dispatch import forced
from lowmem.model.llama import Llama
from lowmem.planner.model_bytes import model_bytes
from lowmem.planner.plan import Choice
from lowmem.planner.rehearse import rehearse
from lowmem.train.build import require_hardware
from tests.kernels.calls import Calls

CONFIG = ModelConfig(
    hidden_size=32,
    intermediate_size=53,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=61,
)
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of a gradient's norm: docs/kernels.md."""


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    forget = compiled._compiled.cache_clear  # tests put something else in its place
    yield
    forget()
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the compiler's front end, whose graph then runs operator by operator: seconds."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def model_of(dtype: torch.dtype, *, compile_it: bool, device: str = "cpu") -> Llama:
    attention = "flash" if device == "meta" else "auto"
    model = Llama(
        CONFIG,
        dtype=dtype,
        device=device,
        recompute="attn:1,full",
        attention=attention,
        compiled=compile_it,
    )
    model.initialise(3)
    return model


def made(model: Llama, rows: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    tokens = torch.arange(rows * length).mul_(7).remainder_(61).view(rows, length)
    loss = model.loss(tokens, tokens, 100)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(dtype: torch.dtype, shapes: list[tuple[int, int]]) -> None:
    plain, ours = (model_of(dtype, compile_it=asked) for asked in (False, True))
    for shape in shapes:
        (loss, wanted), (found, gradients) = made(plain, *shape), made(ours, *shape)
        torch.testing.assert_close(found, loss, rtol=BOUND[dtype] / 4, atol=0)
        for name, gradient in gradients.items():
            error = (gradient.double() - wanted[name].double()).norm()
            assert error <= BOUND[dtype] * wanted[name].double().norm(), (name, shape)


@pytest.mark.slow
def test_every_piece_is_one_graph_for_all_shapes(
    traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    kept = compiled._compiled

    def noted(function: Any, backend: str) -> Any:
        seen.append(f"{function.__module__.rpartition('.')[2]}.{function.__name__}")
        return kept(function, backend)

    monkeypatch.setattr(compiled, "_compiled", noted)
    compare(torch.float32, [(2, 19), (3, 32)])
    assert set(seen) == {
        *("rms_norm._normalised", "rms_norm._normalised_again", "rms_norm._rows_backward"),
        *("rope._turn", "swiglu._product", "swiglu._rows_backward"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_stay_within_the_bound(dtype: torch.dtype) -> None:
    compare(dtype, [(2, 19), (1, 5), (3, 1), (4, 32)])


@pytest.mark.slow
def test_the_bits_do_not_depend_on_which_shape_came_first() -> None:
    found = []
    for shapes in ([(4, 8), (2, 19), (1, 32)], [(1, 32), (2, 19), (4, 8)]):
        compiled._compiled.cache_clear()
        torch._dynamo.reset()
        model = model_of(torch.float32, compile_it=True)
        found.append({shape: made(model, *shape) for shape in shapes})
    for shape, (loss, gradients) in found[0].items():
        assert torch.equal(loss, found[1][shape][0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, found[1][shape][1][name]), (name, shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_piece_takes_more_memory_than_it_does_by_itself(dtype: torch.dtype) -> None:
    plain, ours = (model_of(dtype, compile_it=asked) for asked in (False, True))
    made(ours, 3, 32), made(ours, 8, 64)  # compiled
    peaks = {name: peak(model, 8, 64) for name, model in (("plain", plain), ("ours", ours))}
    assert peaks["ours"] <= peaks["plain"]


def peak(model: Llama, rows: int, length: int) -> int:
    """Most bytes that the CPU's allocator had given out beyond those at the beginning."""
    made(model, rows, length)
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        made(model, rows, length)
    live = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    assert highest > 0
    return highest


def test_a_plan_counts_what_the_pieces_take_uncompiled() -> None:
    tokens = torch.empty(2, 19, dtype=torch.int64, device="meta")
    model = model_of(torch.bfloat16, compile_it=True, device="meta")
    with forced("triton"), Calls() as calls:
        model.loss(tokens, tokens, 38).backward()
    inside = {operator.__name__.partition(".")[0] for operator, _ in calls.kernels}
    assert inside <= {"rms_norm", "rms_norm_backward"}  # of the final norm, which is in no block


def test_the_planner_rehearses_what_was_asked_for() -> None:
    how = Choice("", None, "", "bf16", "unfused", "full", 2, 1, None)
    optimizer = OptimizerConfig(method="adamw")
    for asked in (False, True):
        choice = replace(how, compiled=asked)
        assert (", compiled" in choice.sentence()) == asked
        with forced("triton"), Calls() as whole:
            rehearse(CONFIG, optimizer, choice, 16, attention="flash")
        with forced("triton"), Calls() as composed:
            model_bytes(CONFIG, choice, 16, "flash")
        for calls in (whole, composed):
            rotates = any("rotate" in operator.__name__ for operator, _ in calls.kernels)
            assert rotates != asked


def test_without_a_compiler_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"weights": "fp32", "device": "cpu", "compile": True}
    config = Config.model_validate({"model": "llama-tiny", "train": train})
    require_hardware(config)
    monkeypatch.setattr("lowmem.kernels.native.compiler", lambda: None)
    with pytest.raises(HardwareError, match="no compiler") as caught:
        require_hardware(config)
    assert "train.compile = false" in caught.value.fix


def test_what_does_not_compile_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise torch._inductor.exc.CppCompileError(["c++"], "no such header")

    monkeypatch.setattr(compiled, "_compiled", lambda *_: fail)
    model = model_of(torch.float32, compile_it=True)
    with pytest.raises(HardwareError, match="fails for _normalised") as caught:
        made(model, 1, 4)
    assert "train.compile = false" in caught.value.fix
