"""Lion, the sign of a momentum."""

from pydantic import NonNegativeInt

from lowmem.config.schema import StateFormat
from lowmem.optim.formats import format_named
from lowmem.optim.method import ByRole, Dense
from lowmem.optim.methods.arguments import Betas
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.rules import Lion


def lion(
    *,
    betas: Betas = (0.9, 0.99),
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
) -> ByRole:
    """Lion: the sign of an interpolated momentum.

        W <- (1 - lr wd) W - lr * sign(b1 M + (1 - b1) G);   then  M <- b2 M + (1 - b2) G

    Every element moves by lr, so lr is 3 to 10 times smaller than AdamW's, and weight decay as much
    larger. bf16 moments are rounded stochastically: to nearest, a share of 1 - b2 would be lost.

    Source: Chen et al. 2023, arXiv:2302.06675, Algorithm 2. State: one momentum of the weight's
    shape.
    """
    method = Dense(Lion(betas, format_named(states, min_8bit)))
    return ByRole(method, method)


SPEC = MethodSpec(lion, {"any": {"lr": 1e-4}}, "arXiv:2302.06675, released default")
