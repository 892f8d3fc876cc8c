"""What the planner says of the trials of a sweep, before any of them runs."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from lowmem.cli.settings import planned
from lowmem.config.schema import Config
from lowmem.config.toml import to_toml
from lowmem.errors import LowMemError
from lowmem.units import format_bytes

_NOT_PLANNED = {"train": {"seed": 0}, "optimizer": {"lr": 0.0}, "run": {"name": None}}


@dataclass(frozen=True)
class Forecast:
    """What the planner says of a trial. refused: why it cannot run, empty where it can.

    peak: bytes, reserved. seconds: of training, None where no rates are known.
    """

    peak: int = 0
    seconds: float | None = None
    refused: str = ""


def forecasts(configs: Sequence[Config]) -> Iterator[Forecast]:
    """A forecast for each, made in another process: the context that measuring a card needs would
    stay on it while the trials run."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield from pool.map(forecast_of, configs)


def forecast_of(config: Config) -> Forecast:
    """What the planner says of one trial on this machine."""
    try:
        plan = planned(config, for_this_machine=True)
    except LowMemError as error:
        return Forecast(refused=error.what)
    need, usable = plan.memory.reserved, plan.card.usable_bytes
    if not plan.fits:
        return Forecast(need, refused=f"{format_bytes(need)} needed, {format_bytes(usable)} usable")
    return Forecast(need, plan.training_seconds)


def kind_of(config: Config) -> str:
    """Equal for trials with the same plan."""
    changes = {name: getattr(config, name).model_copy(update=v) for name, v in _NOT_PLANNED.items()}
    return to_toml(config.model_copy(update=changes))
