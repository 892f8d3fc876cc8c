"""What the followers of methods with 8-bit weights share: recorded codes, scales and noise."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.kernels.grouped_weight import GroupedWeight
from lowmem.optim.optimizer import Optimizer
from tests.optim.followers.oracle import CODE_SHARE, Oracle


@dataclass
class Recorded:
    """The recorded uniforms of one weight; `update` says whose turn it is."""

    oracle: Oracle
    name: str
    update: int = 0

    def __call__(self, count: int, seed: int, offset: int, device: torch.device) -> Tensor:
        noise = self.oracle.tensors[f"rand.{self.update}.{self.name}"]
        return noise.view(-1)[offset : offset + count]


@dataclass
class Grouped:
    """The projected weights of a file as codes, where it has codes; what differed is gathered."""

    oracle: Oracle
    weights: dict[str, GroupedWeight] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        about, tensors = self.oracle.about, self.oracle.tensors
        if about["weight_bits"] != 8:
            return
        for name in about["projected"]:
            scales, zeros = (tensors[f"init{what}.{name}"].view(-1).clone() for what in "sz")
            self.weights[name] = GroupedWeight(
                tensors[f"initq.{name}"].clone(),
                scales,
                zeros,
                about["weight_group"],
                torch.float32,
                Recorded(self.oracle, name) if about["stochastic_round"] else None,
                span_zero=False,
            )

    def after(self, done: int, optimizer: Optimizer) -> None:
        """Compare codes, and move the noise on."""
        for name, weight in self.weights.items():
            if isinstance(weight.noise, Recorded):
                weight.noise.update = done
            if done in self.oracle.about["saved_after"] and not self._agrees(weight, done, name):
                self.differences.append(f"codes.{done}.{name}")

    def _agrees(self, weight: GroupedWeight, done: int, name: str) -> bool:
        """Few codes differ, and all stand for values at most two codes apart.

        Where a rounded zero point tips over, all codes of a group differ and the values do not.
        """
        codes, values = (
            self.oracle.tensors[f"{what}.{done}.{name}"] for what in ("weightq", "weight")
        )
        code = weight.scales.repeat_interleave(weight.group)[: weight.numel()].view(weight.shape)
        near = (weight.values() - values).abs() <= 2.01 * code
        return bool((weight.codes != codes).float().mean() <= CODE_SHARE) and bool(near.all())
