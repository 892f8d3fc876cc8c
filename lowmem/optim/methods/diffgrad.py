"""diffGrad: Adam with friction where the gradient hardly changes."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeInt
from torch import Tensor

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import Float32, Format, State, fill_zero, format_named, turned
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas, Eps
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.place import Place
from lowmem.optim.rules import Adam, Direction


@dataclass(frozen=True)
class DiffGrad:
    """Adam's direction times sigmoid(|previous G - G|), in (0.5, 1)."""

    by_rows: ClassVar[bool] = True
    betas: tuple[float, float]
    eps: float
    format: Format = Float32()  # noqa: RUF009 - frozen, shared on purpose

    @property
    def _adam(self) -> Adam:
        return Adam(self.betas, self.eps, "inside", self.format)

    def init(self, state: State, like: Tensor, place: Place) -> None:
        self._adam.init(state, like, place)
        self.format.zeros(state, "previous", like, signed=True)

    def direction(self, gradient: Tensor, state: State) -> Direction:
        adam = self._adam.direction(gradient, state)

        def of(piece: Tensor, at: slice) -> Tensor:
            previous = self.format.load(state, "previous", at)
            friction = (previous - piece).abs_().sigmoid_()
            self.format.store(state, "previous", at, previous.copy_(piece))
            return friction.mul_(adam.of(piece, at))

        return Direction(of, adam.factor)

    def reset(self, state: State) -> None:
        self._adam.reset(state)
        fill_zero(state, "previous")

    def rotate(self, state: State, transition: Tensor, right: bool) -> None:
        self._adam.rotate(state, transition, right)
        turned(self.format, state, "previous", transition, right)


def diffgrad(
    *,
    betas: Betas = (0.9, 0.999),
    eps: Eps = 1e-8,
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """diffGrad: Adam slowed down by up to a half where the gradient stays the same.

        W <- (1 - lr wd) W - lr * sigmoid(|G_k-1 - G_k|) * Adam(G_k),  G_0 = 0

    Source: Dubey et al. 2019, arXiv:1909.11015, equations 6 to 9. State: two moments and the
    previous gradient, each of the weight's shape.
    """
    method = Dense(DiffGrad(betas, eps, format_named(states, min_8bit, floor_codes)))
    return ByRole(method, method)


SPEC = MethodSpec(
    diffgrad, {"any": {"lr": 1e-3}}, "arXiv:1909.11015, default; nothing published at these sizes"
)
