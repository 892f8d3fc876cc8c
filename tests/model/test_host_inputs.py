"""Inputs of blocks that wait in host memory for backward, against those that stay."""

from typing import Any

import pytest
import torch

from lowmem.config.schema import ModelConfig
from lowmem.model.llama import Llama
from lowmem.planner.speed import input_bytes
from tests.model.test_layer_major import SHAPE, UPDATES, assert_same, settings_of, trained

MODES = [("unfused", (2, 2, 1)), ("fused+subspace", (1, 3)), ("fused", (3,))]


@pytest.mark.parametrize("recompute", ["full", "attn", "keep", "keep:2,full"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("mode", "sizes"), MODES)
def test_no_bit_changes(mode: str, sizes: tuple[int, ...], weights: str, recompute: str) -> None:
    """Micro-batches of rising and falling size; the first block's input is the embedding's."""
    case = settings_of("galore")
    stays, goes = (
        trained(mode, case, weights, sizes=sizes, recompute=recompute, boundaries=boundaries)
        for boundaries in ("keep", "host")
    )
    assert_same(stays, goes)


@pytest.mark.parametrize("method", ["sophia", "adahessian"])
def test_passes_that_are_no_update_change_no_bit(method: str) -> None:
    stays, goes = (
        trained("unfused", settings_of(method), boundaries=boundaries, tie_word_embeddings=True)
        for boundaries in ("keep", "host")
    )
    assert_same(stays, goes)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_traffic_is_what_the_planner_prices(layers: int) -> None:
    found = trained("unfused", {"method": "adamw"}, boundaries="host", num_hidden_layers=layers)
    moved = UPDATES * input_bytes(found.model.config, tokens=5 * 16, element=4)
    transfers = found.model.inputs.transfers
    assert (transfers.stored, transfers.fetched) == (moved, moved)


def test_host_memory_is_taken_once() -> None:
    model = Llama(
        ModelConfig.model_validate(SHAPE), dtype=torch.float32, device="cpu", boundaries="host"
    )
    model.initialise(0)
    inputs, taken = torch.zeros(2, 16, dtype=torch.int64), []
    for rows in (2, 1, 2):
        model.loss(inputs[:rows], inputs[:rows], 32).backward()
        taken.append([home.data_ptr() for home in model.inputs._homes.values()])
    assert taken[0] == taken[1] == taken[2]
    assert len(taken[0]) == SHAPE["num_hidden_layers"] - 1  # the last block needs its own at once


@pytest.mark.parametrize("late", [0, 1])
def test_a_backward_behind_another_forward_is_refused(late: int) -> None:
    """Its block inputs are gone: a gradient would be wrong and nobody would know."""
    model = Llama(
        ModelConfig.model_validate(SHAPE), dtype=torch.float32, device="cpu", boundaries="host"
    )
    model.initialise(0)
    inputs = torch.zeros(2, 16, dtype=torch.int64)
    losses: list[Any] = [model.loss(inputs, inputs, 32) for _ in range(2)]
    if late:
        losses.pop().backward()
    with pytest.raises(RuntimeError, match="call backward before the next forward"):
        losses[0].backward()
