"""APOLLO: the gradient, scaled channel by channel from moments in a random subspace."""

import math
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lowmem.config.schema import StateFormat
from lowmem.errors import ConfigError
from lowmem.optim.bases import Solver
from lowmem.optim.channels import ChannelScaling, Per
from lowmem.optim.formats import format_named
from lowmem.optim.limiters import NormGrowth
from lowmem.optim.method import ByRole, Dense, Projected
from lowmem.optim.methods.arguments import Betas, Bias, Eps, Gamma
from lowmem.optim.methods.spec import MethodSpec
from lowmem.optim.projectors import SVD, Projector
from lowmem.optim.random_projectors import RandomNormal
from lowmem.optim.refresh import Every
from lowmem.optim.rules import Adam

Projection = Literal["random", "svd"]
KeepOrReset = Literal["keep", "reset"]


def apollo(
    *,
    rank: PositiveInt = 128,
    gap: PositiveInt = 200,
    alpha: PositiveFloat | None = None,
    scale: PositiveFloat | None = None,
    per: Per = "channel",
    projection: Projection = "random",
    solver: Solver = "iteration",
    gamma: Gamma = 1.01,
    scale_front: bool = False,
    staggered: bool = True,
    on_refresh: KeepOrReset = "keep",
    betas: Betas = (0.9, 0.999),
    eps: Eps | None = None,
    bias: Bias = "step",
    states: StateFormat = "fp32",
    min_8bit: NonNegativeInt = 4096,
    floor_codes: bool = True,
) -> ByRole:
    """APOLLO: SGD whose rate per channel comes from Adam in a random subspace.

    Every `gap` updates  P <- normal numbers, s x r, on the shorter side s of G
        R = P'G;  N = Adam(R);  phi_j = |N_j| / (|R_j| + 1e-8) per channel of the longer side
        X = G phi, its norm growing by at most the factor gamma per update
        W <- W - lr * alpha * X

    alpha is the paper's; scale = alpha^2 is how the released code names it (neither given: 1). per:
    one phi per channel or per tensor. projection: "svd" takes singular vectors, found by `solver`.
    scale_front is accepted and changes nothing: the limiter is a ratio of norms. eps is 1e-6, or
    1e-8 if the bias is corrected "inside". Where the released code would let a zero gradient freeze
    a matrix, the limiter here waits. As published: staggered = false. Embedding, head and norms
    follow the same Adam.

    Source: Zhu et al. 2024, arXiv:2412.05270, Algorithm 1. State per matrix: two moments (r x b)
    and one number; P (s x r) only for "svd", random ones are drawn anew in every update.
    """
    if eps is None:
        eps = 1e-8 if bias == "inside" else 1e-6
    adam = Adam(betas, eps, bias, format_named(states, min_8bit, floor_codes))
    random = projection == "random"
    projector: Projector = RandomNormal(rank) if random else SVD(rank, "std", solver)
    lift = ChannelScaling(per, alpha_of(alpha, scale), NormGrowth(gamma))
    matrix = Projected(projector, adam, lift, Every(gap, staggered), on_refresh)
    return ByRole(matrix, Dense(adam, decay_first=False))


def alpha_of(alpha: float | None, scale: float | None, default_scale: float = 1.0) -> float:
    """alpha = sqrt(scale), from whichever is given; ConfigError if both are and differ by 1 %."""
    if alpha is not None and scale is not None and not math.isclose(alpha**2, scale, rel_tol=0.01):
        raise ConfigError(
            f"optimizer.alpha = {alpha} and optimizer.scale = {scale} contradict each other",
            f"scale is alpha squared, here {alpha**2:.6g}",
            f"leave out one of them: alpha = {alpha} or scale = {scale}",
        )
    if alpha is not None:
        return alpha
    return math.sqrt(scale if scale is not None else default_scale)


SPEC = MethodSpec(
    apollo,
    {
        "60m": {"lr": 0.01, "rank": 128, "gap": 200, "scale": 1.0},
        "130m": {"lr": 0.01, "rank": 192, "gap": 200, "scale": 1.0},
        "350m": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 1.0},
        "1b": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 1.0},
        "7b": {"lr": 0.01, "rank": 256, "gap": 200, "scale": 1.0},
    },
    "arXiv:2412.05270, released scripts",
)
