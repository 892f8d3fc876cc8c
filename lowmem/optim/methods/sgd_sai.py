"""SGD-SaI: SGD with momentum, its learning rates scaled once, at initialisation."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.kernels.slices import flat_slices
from lowmem.optim.formats import (
    Float32,
    Format,
    State,
    fill_zero,
    format_named,
    number,
    tensor,
    turned,
)
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Beta, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Direction


@dataclass(frozen=True)
class SgdSai:
    """snr * B with B = G the first time, then B <- mu B + (1 - mu) G.

    snr: 0-dim, of the first gradient that is finite and not zero; 0 until then.
    """

    momentum: float
    eps: float
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    def init(self, state: State, like: Tensor, place: Place) -> None:
        state["snr"] = torch.zeros((), device=like.device)
        if self.momentum:
            self.format.zeros(state, "exp_avg", like, signed=True)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        snr = tensor(state, "snr")
        found = signal_to_noise(gradient, self.eps)
        # Whether it is known is not asked: that would wait for the device.
        snr.copy_(torch.where((snr == 0) & found.isfinite(), found, snr))
        kept, added = (
            (0.0, 1.0) if number(state, "step") == 1 else (self.momentum, 1 - self.momentum)
        )

        def of(piece: Tensor, at: slice) -> Tensor:
            if not self.momentum:
                return piece * snr
            buffer = self.format.load(state, "exp_avg", at)
            buffer.mul_(kept).add_(piece, alpha=added)
            moved = buffer * snr
            self.format.store(state, "exp_avg", at, buffer)
            return moved

        return Direction(of)

    def reset(self, state: State) -> None:
        if self.momentum:
            fill_zero(state, "exp_avg")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        if self.momentum:
            turned(self.format, state, "exp_avg", transition, right)


def signal_to_noise(gradient: Tensor, eps: float) -> Tensor:
    """||G|| / (std(G) + eps), 0-dim; 1 for one element other than zero, which has no deviation."""
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    if gradient.numel() == 1:
        return norm.sign()
    flat, mean = gradient.view(-1), gradient.mean(dtype=torch.float32)
    squares = torch.zeros((), device=gradient.device)
    for piece in flat_slices(flat):
        squares += (flat[piece].float() - mean).square_().sum()
    return norm / ((squares / (gradient.numel() - 1)).sqrt_() + eps)


def sgd_sai(
    *,
    momentum: Beta = 0.9,
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """SGD-SaI: SGD with momentum and a learning rate per tensor, from its first gradient.

        first update only:  snr = ||G|| / (std(G) + eps)
        B <- mu B + (1 - mu) G;  W <- (1 - lr wd) W - lr * snr * B

    A zero first gradient would freeze the tensor: the next one decides. A tensor of one element
    has snr = 1. The released version 1.0.4 divides all snr by their largest, which needs every
    gradient before the first step; this is the paper's form.

    Source: Xu et al. 2024, arXiv:2412.11768, Algorithm 1. State: the momentum and one number.
    """
    method = Dense(SgdSai(momentum, eps, format_named(states, min_8bit, floor_codes)))
    return ByRole(method, method)


SPEC = MethodSpec(sgd_sai, {"any": {"lr": 1e-2}}, "arXiv:2412.11768, default of the released code")
