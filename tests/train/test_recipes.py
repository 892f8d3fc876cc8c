"""The first updates of every recipe, on a model that a test can afford."""

from typing import Any

import pytest
import torch

from lowmem.config.load import load
from lowmem.config.recipes import recipes
from lowmem.config.schema import Config, ModelConfig, settled
from lowmem.kernels.grouped_weight import GroupedWeight, Weight
from lowmem.optim.step import gather
from lowmem.planner.ways import clip_of
from lowmem.train.build import declared
from lowmem.train.schedule import learning_rate
from tests.conftest import TINY_MODEL

ALSO = ("cosmos-130m", "cosmos-130m-script", "q-apollo-mini-7b-script", "galore-7b")
"""Beside those of 60M, which have the same parts as the others of their method."""


def scaled_down(name: str) -> Config:
    """The recipe for a model of two blocks, at its highest rate from the second update on."""
    given: dict[str, Any] = {
        "recipe": name,
        "train.updates": 20,
        "train.update": "unfused",
        "train.recompute": "keep",
        "train.micro_batch": 4,
        "train.device": "cpu",
        "schedule.warmup": 1,
        "schedule.cycle": 0,
    }
    config = load(given, environ={}).config
    rank = config.optimizer.rank
    if isinstance(rank, int):
        optimizer = config.optimizer.model_copy(update={"rank": min(rank, 4)})
        config = config.model_copy(update={"optimizer": optimizer})
    return config.model_copy(update={"model": ModelConfig.model_validate(TINY_MODEL)})


def content(weight: Weight) -> torch.Tensor:
    return (weight.codes if isinstance(weight, GroupedWeight) else weight).detach().clone()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            one.name, marks=() if one.size == "60m" or one.name in ALSO else pytest.mark.slow
        )
        for one in recipes()
    ],
)
def test_first_updates_move_every_weight_and_lower_the_loss(name: str) -> None:
    config = scaled_down(name)
    model, optimizer = declared(config, "cpu")
    optimizer.attach(model)
    model.initialise(config.train.seed)
    before = {key: content(weight) for key, weight in model.weights().items()}
    tokens = torch.randint(0, 400, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for update in range(8):
        lr = learning_rate(config.schedule, settled(config.optimizer.lr), update, 20)
        loss, _ = gather(
            model,
            optimizer,
            [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())],
            count=1,
            tokens=4 * 32,
            lr=lr,
            clip=clip_of(config, "unfused"),
        )
        optimizer.step()
        losses.append(loss.item())
    still = [k for k, w in model.weights().items() if torch.equal(content(w), before[k])]
    assert not still
    assert losses[-1] < losses[0]  # the same batch again and again
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
